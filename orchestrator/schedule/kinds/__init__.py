"""A generator for each kind of schedule, and `registry`, the one table of them.

May import: schedule.ir.
"""
