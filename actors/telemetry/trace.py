"""Measured spans as a trace that Perfetto and chrome://tracing open: a process per rank, a row per lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.layout.layout import Place
from orchestrator.schedule.ir.spans import Span
from orchestrator.schedule.pictures.trace import event, process, trace_text


def trace_json(steps: Mapping[int, Sequence[Span]], places: Mapping[int, Sequence[Place]] | None = None) -> str:
    """Chrome trace events, microseconds from the first span.

    steps: spans of all ranks by step, on one machine's clock. places: by step, where its ranks stood; events then carry
    their row, position and width beside the step. Without, rank and position are taken to be the same.
    """
    spans = [(step, span) for step, found in steps.items() for span in found]
    zero = min((span.start for _, span in spans), default=0.0)
    events = [named for rank in sorted({span.rank for _, span in spans}) for named in process(rank, f"rank {rank}")]
    for step, span in spans:
        args = {"step": step}
        if places is not None:
            place = places[step][span.rank]
            args |= {"row": place.row, "position": place.position, "width": place.width}
        events.append(event(span.rank, span, zero, 1e6, args))
    return trace_text(events)
