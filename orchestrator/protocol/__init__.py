"""The control protocol of a run as one state machine: what is committed, who is lost, which state goes on, who joins, what ends it.

Events come in (`events`), commands go out (`commands`); `run.Run.handle` is all there is between them. No clock, thread, file, tensor
or exception for what may happen: the same machine runs under `actors/protocol`, which carries its commands out, and under a
simulator that tries to break it.

May import: config, told.
"""
