"""What a run is told, in one validated model, and how a wrong key, type or layout is refused.

May import: schedule.ir, schedule.kinds.
"""
