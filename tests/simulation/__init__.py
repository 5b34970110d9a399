"""A world that tries to break the state machine of `orchestrator/protocol`: ranks, network, storage and faults on virtual time.

One seed is one run: the same events at the same times, always. Invariants are checked at the event at which they break.
"""
