"""What carries a run's control protocol out: threads, files, tokens and process groups around orchestrator/protocol, which decides.

One thread, the conductor's, hands what happens to the state machine and has its commands carried out; nothing there waits for
anything but the next event. What may take long has a thread of its own: the ledger and checkpoints (clerk), batches.

May import: calls, data, files, state, telemetry.
"""
