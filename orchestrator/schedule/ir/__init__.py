"""Stages, actions, programs, the graph of what waits for what, and the checks that a program must pass.

May import: no other room.
"""
