"""Cost, memory and time of a layout and a schedule: before a run, and for the programs of its ranks.

May import: config, data, layout, model, schedule.ir, schedule.kinds, schedule.search, schedule.timing, state.
"""
