"""What a model is made of: its weights by name and shape, and the segments that a stage computes.

May import: config, schedule.ir.
"""
