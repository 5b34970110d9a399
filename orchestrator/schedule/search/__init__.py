"""Search for a schedule that is shorter than all published ones. Start reading at `portfolio.py`.

May import: schedule.ir, schedule.kinds, schedule.timing.
"""

from orchestrator.schedule.search.portfolio import Options, SearchResult, options_for, search, searched
from orchestrator.schedule.search.problem import most_kept

__all__ = ["Options", "SearchResult", "most_kept", "options_for", "search", "searched"]
