"""What is said to a rank and what it answers, and the one interface to any kind of rank process.

May import: comm.
"""
