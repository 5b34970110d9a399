"""With what a run goes on when its nodes have changed: layout, places of experts, and a replay of what was trained.

May import: config, data, layout, model, plan, schedule.ir, schedule.kinds, schedule.timing.
"""
