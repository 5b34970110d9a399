"""What `python -m jobs.bench NAME` runs: `parity` and `tokens` have `run(config) -> dict`, `overlap`, `routing` and `schedule`
have `Settings` and `run(config, settings) -> dict`; `plain` and `text`, and all `NAME_*`, serve them."""
