"""Where all this lives: Ray actors, plain processes, the cluster. But for the feed no other room imports ray.

May import: calls, data, files, protocol, runtime, state, telemetry.
"""
