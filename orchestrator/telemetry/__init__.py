"""What figures mean: who is slow, how much of the time was of use.

May import: layout, schedule.ir.
"""
