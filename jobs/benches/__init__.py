"""What `python -m jobs.bench NAME` runs: `parity` and `tokens` have `run(config) -> dict`, `schedule` has `Settings` and
`run(config, settings) -> dict`; `plain` and `text`, and all `schedule_*`, serve them."""
