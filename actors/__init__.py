"""What is done: processes, messages, files, tensors. `errors` and `tiles` (numbers in FP8) are for every room.

May import: no other room.
"""
