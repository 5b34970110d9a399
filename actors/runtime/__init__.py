"""A rank from its program to its spans: generations, stages, the streams of operations, the exchange lane.

May import: calls, comm, files, model, protocol, state.
"""
