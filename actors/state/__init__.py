"""Shards of the optimizer, state by generation, how it moves, checkpoints, Hugging Face folders. `orchestrator.state` plans it.

May import: calls, comm, files, model.
"""
