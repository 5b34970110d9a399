"""From text to batches: documents, tokens, packed sequences, the feed of a run, the batch of each rank.

May import: calls, files.
"""
