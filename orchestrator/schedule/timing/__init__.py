"""Durations of actions, measured and assumed, and the simulation of a schedule with them.

May import: schedule.ir.
"""
