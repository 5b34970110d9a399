"""Process groups of a generation, links between neighbours, dispatch and combine, and waits that an abort ends.

May import: no other room.
"""
