"""Search for a schedule that is shorter than all published ones. Start reading at `portfolio.py`.

May import: schedule.ir, schedule.kinds, schedule.timing.
"""

from orchestrator.schedule.search.portfolio import Found, Options, options_for, search, searched

__all__ = ["Found", "Options", "options_for", "search", "searched"]
