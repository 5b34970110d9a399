"""The model in segments, with gradients of its own; `plain` is its twin for a single process.

May import: comm.
"""
