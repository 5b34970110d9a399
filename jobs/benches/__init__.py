"""Benchmarks: each module has `run(config, options) -> dict`, started by `python -m jobs.bench NAME`."""
