"""A schedule as a picture (SVG) and as data (JSON), with the times of a simulation, and of a measured step beside it.

The picture: a bar per rank, time to the right; `render_bars` says what boxes look like. Boxes carry the microbatch number;
hovering tells the rest. What stays grey is idle. With a measured step, each rank has a second bar under the simulated one, on
the same axis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from orchestrator.schedule.ir.actions import Schedule, SplitAction
from orchestrator.schedule.ir.check import peak_activations
from orchestrator.schedule.ir.spans import Figures, Interval, Lane, Span, figures
from orchestrator.schedule.kinds.registry import has_chosen_placement
from orchestrator.schedule.pictures import legend
from orchestrator.schedule.pictures.bars import INK, Bar, Box, draw
from orchestrator.schedule.pictures.geometry import BAR, MARGIN, RIGHT, RowHeights, Scale, px, rectangle, text_width
from orchestrator.schedule.timing.measured import MeasuredStep
from orchestrator.schedule.timing.simulate import Timeline

PALE_INK, LINE = "#55606c", "#c4cbd2"
LEGEND_TOP, TITLE_SIZE, SUBTITLE_SIZE = 66, 17, 13
WIDEST_LEGEND = 1500                                        # it is to be seen without scrolling
_STAGES_SHOWN = 4


def svg(schedule: Schedule, timeline: Timeline, measured: MeasuredStep | None = None) -> str:
    """The picture as an SVG document. `timeline`: a simulation of `schedule`; in milliseconds, if there is a measured step."""
    bars = [simulated_bars(schedule, timeline)] + ([measured_bars(schedule, measured)] if measured else [])
    exchanges = any(bar.exchange for kind in bars for bar in kind)
    left = MARGIN + 116 + (70 if measured else 0)
    title, subtitle = _title(schedule), _subtitle(timeline, measured)
    lengths = (span.end - span.start for row in timeline.rows for span in row)
    scale = Scale.of(lengths, max(timeline.makespan, measured.end if measured else 0.0), left,
                     MARGIN + text_width(subtitle, SUBTITLE_SIZE) + RIGHT)
    width = round(scale.x(scale.makespan) + RIGHT)
    lines = legend.lines(legend.samples(schedule, exchange=exchanges, reduced=any(bar.reduce for bar in bars[-1])),
                                 min(width, WIDEST_LEGEND) - MARGIN - RIGHT)
    rows = RowHeights(LEGEND_TOP + len(lines) * legend.LINE_HEIGHT + 14, schedule.positions, exchanges, len(bars))
    height = round(rows.bottom) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"',
        f' role="img" aria-label="{escape(f"{title}: {subtitle}")}" font-family="Helvetica, Arial, sans-serif" font-size="12"',
        f' fill="{INK}">', rectangle(0, 0, width, height, "white"),
        f'<text x="{MARGIN}" y="28" font-size="{TITLE_SIZE}" font-weight="bold">{escape(title)}</text>',
        f'<text x="{MARGIN}" y="49" font-size="{SUBTITLE_SIZE}">{escape(subtitle)}</text>',
        *legend.draw(lines, LEGEND_TOP), *_axis(scale, rows, "ms" if measured else "time"),
    ]
    for position in range(schedule.positions):
        parts += _names(schedule, position, rows, left, measured is not None)
        for index, kind in enumerate(bars):
            parts += draw(kind[position], position, index, scale, rows)
    return "\n".join([*parts, "</svg>", ""])


def simulated_bars(schedule: Schedule, timeline: Timeline) -> list[Bar]:
    """What the ranks do in a simulation of `schedule`."""
    bars = []
    for row, spans, lanes in zip(schedule.rows, timeline.rows, timeline.lanes, strict=True):
        boxes = []
        for action, span in zip(row, spans, strict=True):
            computes = action.computes
            stages = ", ".join(f"stage {compute.stage}" for compute in computes)
            title = f"{action} ({stages}), {span.start:.6g} to {span.end:.6g}"
            boxes += [Box(compute, title, ((span.start, span.end),), (index, len(computes)), isinstance(action, SplitAction))
                      for index, compute in enumerate(computes)]
        bars.append(Bar(tuple(boxes), **_lanes(lanes)))
    return bars


def measured_bars(schedule: Schedule, measured: MeasuredStep) -> list[Bar]:
    """What the ranks did. The two of a pair are above each other, each at its own times."""
    bars = []
    for position, row in enumerate(schedule.rows):
        boxes = []
        for action in row:
            for index, compute in enumerate(action.computes):
                if pieces := tuple(measured.pieces(position, compute)):
                    title = f"{compute} (stage {compute.stage}), measured {pieces[0][0]:.6g} to {pieces[-1][1]:.6g} ms"
                    boxes.append(Box(compute, title, pieces, (index, len(action.computes)), isinstance(action, SplitAction)))
        bars.append(Bar(tuple(boxes), **_lanes(measured.rows[position])))
    return bars


def as_json(schedule: Schedule, timeline: Timeline, measured: MeasuredStep | None = None) -> str:
    """One JSON object: kind, placement, ranks, chunks, microbatches, makespan, figures by rank, rows, and spans.

    rows: by rank, actions as text. spans: by rank, [start, end] of each action, in the simulation's units; exchange: the same
    of communication. bubble_ratio: mean over ranks, of the makespan. relative_activations: the most on any rank, in
    microbatches on all of a rank's stages. measured: makespan, bubble and exposed communication by rank in milliseconds.
    """
    found = timeline.figures()
    peaks = peak_activations(schedule)
    shown = {
        "kind": schedule.kind,
        "placement": schedule.stages.placement,
        "ranks": schedule.positions,
        "chunks": schedule.stages.chunks,
        "microbatches": schedule.microbatches,
        "makespan": _rounded(timeline.makespan),
        **_by_rank(found, timeline.makespan),
        "bubble_ratio": _rounded(sum(one.bubble_ratio for one in found) / len(found)),
        "peak_activations": list(peaks),
        "relative_activations": max(peaks) / schedule.stages.chunks,
        "rows": [[str(action) for action in row] for row in schedule.rows],
        "spans": [[[_rounded(span.start), _rounded(span.end)] for span in row] for row in timeline.rows],
        "exchange": [[[_rounded(span.start), _rounded(span.end)] for span in row if span.lane == Lane.EXCHANGE]
                     for row in timeline.lanes],
    }
    if measured is not None:
        shown["measured"] = {"step": measured.step, "makespan": _rounded(measured.makespan),
                             **_by_rank(_measured_figures(measured), measured.makespan)}
    return json.dumps(shown)


def _by_rank(found: Sequence[Figures], makespan: float) -> dict[str, list[float]]:
    return {"bubble": [_rounded(one.bubble_ratio * makespan) for one in found],
            "exposed_communication": [_rounded(one.exposed_communication_seconds) for one in found]}


def _measured_figures(measured: MeasuredStep) -> list[Figures]:
    return [figures((span for span in row if span.lane != Lane.REDUCE), 0.0, measured.makespan) for row in measured.rows]


def _rounded(value: float) -> float:
    """Without the last digits of floating-point sums."""
    return round(value, 9)


def _lanes(spans: Sequence[Span]) -> dict[str, tuple[Interval, ...]]:
    return {name: tuple((span.start, span.end) for span in spans if span.lane == lane)
            for name, lane in (("compute", Lane.COMPUTE), ("exchange", Lane.EXCHANGE), ("reduce", Lane.REDUCE))}


def _title(schedule: Schedule) -> str:
    ranks = f"{schedule.positions} rank{'s' * (schedule.positions > 1)}"
    chunks = f", {schedule.stages.chunks} chunks" if schedule.stages.chunks > 1 else ""
    placed = f", placement {schedule.stages.placement}" if has_chosen_placement(schedule.kind) else ""
    return f"{schedule.kind}: {ranks}{chunks}{placed}, {schedule.microbatches} microbatch{'es' * (schedule.microbatches > 1)}"


def _subtitle(timeline: Timeline, measured: MeasuredStep | None) -> str:
    found = timeline.figures()
    if measured is None:
        return f"makespan {timeline.makespan:.5g}, {_figures(found, timeline.makespan, '')}"
    return (f"simulated: makespan {timeline.makespan:.4g} ms, {_figures(found, timeline.makespan, ' ms')}; "
            f"measured (step {measured.step}): makespan {measured.makespan:.4g} ms, "
            f"{_figures(_measured_figures(measured), measured.makespan, ' ms')}")


def _figures(found: Sequence[Figures], makespan: float, unit: str) -> str:
    """Bubble and exposed communication, each as the range over the ranks."""
    words = [f"bubble {_range([one.bubble_ratio * makespan for one in found], makespan, unit)}"]
    if any(one.communication_seconds for one in found):
        exposed = [one.exposed_communication_seconds for one in found]
        words.append(f"exposed communication {_range(exposed, makespan, unit)}")
    return ", ".join(words)


def _range(values: Sequence[float], whole: float, unit: str) -> str:
    low, high = min(values), max(values)
    absolute, share = f"{_rounded(high):.4g}", f"{100 * high / whole:.1f}"
    if f"{_rounded(low):.4g}" != absolute:
        absolute, share = f"{_rounded(low):.4g}–{absolute}", f"{100 * low / whole:.1f}–{share}"
    return f"{absolute}{unit} ({share} %)"


def _names(schedule: Schedule, position: int, rows: RowHeights, left: float, measured: bool) -> Iterator[str]:
    """A rank's name, the stages it hosts, and which bar is which."""
    stages = [str(stage) for stage in schedule.stages.hosted(position) if stage is not None]
    if len(stages) > _STAGES_SHOWN:
        stages[_STAGES_SHOWN - 2:-1] = ["…"]
    y, pale = rows.y(position), f'font-size="10.5" fill="{PALE_INK}"'
    yield f'<text x="{MARGIN}" y="{px(y + 15)}" font-weight="bold">rank {position}</text>'
    yield f'<text x="{MARGIN}" y="{px(y + 29)}" {pale}>stage{"s" * (len(stages) > 1)} {", ".join(stages)}</text>'
    for index, name in enumerate(("simulated", "measured") if measured else ()):
        yield f'<text x="{px(left - 6)}" y="{px(rows.y(position, index) + BAR / 2 + 4)}" text-anchor="end" {pale}>{name}</text>'


def _axis(scale: Scale, rows: RowHeights, unit: str) -> Iterator[str]:
    y = px(rows.bottom + 16)
    yield f'<text x="{px(scale.left - 14)}" y="{y}" text-anchor="end" fill="{PALE_INK}">{unit}</text>'
    for number in range(int(scale.makespan / scale.tick + 1e-9) + 1):
        x = px(scale.x(number * scale.tick))
        yield f'<line x1="{x}" y1="{px(rows.top - 4)}" x2="{x}" y2="{px(rows.bottom + 2)}" stroke="{LINE}"/>'
        yield f'<text x="{x}" y="{y}" text-anchor="middle" fill="{PALE_INK}">{number * scale.tick:.6g}</text>'
