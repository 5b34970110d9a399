"""Bytes across nodes, cost of choosing, load of ranks."""
