"""Spans as a trace that Perfetto and chrome://tracing open: a process per rank, a row per lane."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from orchestrator.schedule.ir.spans import Lane, Span
from orchestrator.schedule.timing.measured import MeasuredStep

_ROWS = {lane.value: row for row, lane in enumerate(Lane)}


def process(number: int, name: str) -> list[dict]:
    """A process and its lanes. Processes are shown in the order of their numbers."""
    named = [("process_name", None, {"name": name}), ("process_sort_index", None, {"sort_index": number})]
    named += [("thread_name", row, {"name": lane}) for lane, row in _ROWS.items()]
    return [{"name": what, "ph": "M", "pid": number, **({} if row is None else {"tid": row}), "args": args}
            for what, row, args in named]


def event(number: int, span: Span, zero: float, per_unit: float, args: Mapping[str, object]) -> dict:
    """A span of process `number`. per_unit: microseconds of the unit of its times; zero: the time that becomes 0."""
    return {"name": span.label, "cat": str(span.lane), "ph": "X", "pid": number, "tid": _ROWS[span.lane],
            "ts": (span.start - zero) * per_unit, "dur": (span.end - span.start) * per_unit, "args": dict(args)}


def trace_text(events: Iterable[dict]) -> str:
    return json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms"})


def schedule_trace(simulated: Iterable[Iterable[Span]], measured: MeasuredStep | None = None) -> str:
    """A simulated step, one unit of time as a millisecond; and the measured one under it, rank by rank, both from time 0.

    simulated: spans by rank. The name of a process tells which of the two it is.
    """
    events = []
    for rank, spans in enumerate(simulated):
        events += process(2 * rank, f"rank {rank} simulated")
        events += [event(2 * rank, span, 0.0, 1e3, {}) for span in spans]
        if measured is not None:
            events += process(2 * rank + 1, f"rank {rank} measured")
            events += [event(2 * rank + 1, span, 0.0, 1e3, {"step": measured.step}) for span in measured.rows[rank]]
    return trace_text(events)
