"""Measured spans as a trace that Perfetto and chrome://tracing open: a process per rank, a row per lane."""

from __future__ import annotations

import json
from collections.abc import Iterable

from orchestrator.schedule.spans import Lane, Span

_ROWS = {lane.value: row for row, lane in enumerate(Lane)}


def trace_json(steps: dict[int, list[Span]]) -> str:
    """Chrome trace events, microseconds from the first span. `steps`: spans of all ranks by step, on one machine's clock."""
    spans = [(step, span) for step, found in steps.items() for span in found]
    zero = min((span.start for _, span in spans), default=0.0)
    events = [*_names({span.rank for _, span in spans})]
    for step, span in spans:
        events.append({"name": span.label, "cat": span.lane, "ph": "X", "pid": span.rank, "tid": _ROWS[span.lane],
                       "ts": (span.start - zero) * 1e6, "dur": (span.end - span.start) * 1e6, "args": {"step": step}})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _names(ranks: Iterable[int]) -> Iterable[dict]:
    for rank in sorted(ranks):
        yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for lane, row in _ROWS.items():
            yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": row, "args": {"name": lane}}
