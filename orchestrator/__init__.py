"""What is decided, in plain Python: no clock, no file, no torch, no ray. `refusal` (how anything is refused) and `topology` (nodes
and their ranks) are for every room.

May import: no other room.
"""
