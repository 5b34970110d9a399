"""Schedules and measured steps as SVG and as traces.

May import: schedule.ir, schedule.kinds, schedule.timing.
"""
