"""Which sequences a step has, and the line of the ledger that commits it.

May import: config.
"""
