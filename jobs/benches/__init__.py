"""What `python -m jobs.bench NAME` runs: `parity` and `tokens` have `run(config) -> dict`; `plain` and `text` serve them."""
