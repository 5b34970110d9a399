"""What `python -m jobs.bench NAME` runs: a package a bench, whose `bench` has `run(config) -> dict`, or `Settings` and
`run(config, settings) -> dict`."""
