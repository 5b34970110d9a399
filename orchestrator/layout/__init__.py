"""Who stands where: ranks on nodes, experts on ranks, and how loads of experts are balanced.

May import: config, model, schedule.ir.
"""
