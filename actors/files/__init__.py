"""Paths and URIs of any file system, journals, tensor files, the folder of a run.

May import: no other room.
"""
