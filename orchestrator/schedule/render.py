"""A schedule as a picture (SVG) and as data (JSON), with the times of a simulation.

The picture: a row per rank, time to the right. Hue is the direction (slot), light a forward, dark a full backward; split
backwards have colours of their own and a line in the hue of their direction. A pair is one box: forward above, backward
below. Boxes carry the microbatch number; hovering tells the rest. What stays grey is idle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape

from orchestrator.schedule.actions import Compute, Kind, Pair, Schedule, stage_at
from orchestrator.schedule.check import peak_activations
from orchestrator.schedule.simulate import Timeline
from orchestrator.schedule.spans import Span

LIGHT = ("#a9cdf0", "#fbd08f", "#bfe3b4", "#e3c1e6")        # forward, by slot
DARK = ("#2b6cb0", "#c9560c", "#3a8a3f", "#8a3f96")         # full backward, by slot
SPLIT = {Kind.BACKWARD_INPUT: "#8fd3c4", Kind.BACKWARD_WEIGHT: "#d9c7ee"}
INK, PALE_INK, IDLE, LINE = "#1d2733", "#5b6673", "#e6eaee", "#cfd5db"
NAMES = {
    Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.BACKWARD_INPUT: "backward, input only",
    Kind.BACKWARD_WEIGHT: "backward, weights only",
}
LEFT, RIGHT, TOP, BAR, GAP = 132, 28, 92, 34, 6             # pixels
WIDEST = 9000


@dataclass(frozen=True, slots=True)
class _Scale:
    """Time to pixels: the shortest action is wide enough for its number, unless the picture would be endless."""

    per_unit: float
    makespan: float

    @classmethod
    def of(cls, timeline: Timeline) -> _Scale:
        lengths = [span.end - span.start for row in timeline.rows for span in row if span.end > span.start]
        makespan = timeline.makespan or 1.0
        return cls(min(max(20 / min(lengths, default=1.0), 1000 / makespan), WIDEST / makespan), makespan)

    def x(self, time: float) -> float:
        return LEFT + time * self.per_unit

    @property
    def tick(self) -> float:
        """Distance of marks on the axis: 1, 2 or 5 times a power of ten, at least 40 pixels."""
        power = 10.0 ** -12
        while True:
            for factor in (1, 2, 5):
                if factor * power * self.per_unit >= 40:
                    return factor * power
            power *= 10


def svg(schedule: Schedule, timeline: Timeline) -> str:
    """The picture as an SVG document. `timeline`: a simulation of `schedule`."""
    scale = _Scale.of(timeline)
    bottom = TOP + schedule.positions * (BAR + GAP)
    width, height = max(round(scale.x(scale.makespan)) + RIGHT, 1180), bottom + 34
    title = _title(schedule, timeline)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"',
        f' role="img" aria-label="{escape(title)}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="16" y="30" font-size="17" font-weight="bold">{escape(title)}</text>',
        *_legend(schedule),
        *(part for position in range(schedule.positions) for part in _background(schedule, position, scale)),
        *_axis(scale, bottom),
    ]
    for position, (row, spans) in enumerate(zip(schedule.rows, timeline.rows, strict=True)):
        for action, span in zip(row, spans, strict=True):
            parts.extend(_box(action, span, scale, _y(position)))
    return "\n".join([*parts, "</svg>", ""])


def as_json(schedule: Schedule, timeline: Timeline) -> str:
    """One JSON object: kind, ranks, microbatches, makespan, bubble and peak activations by rank, rows, and spans.

    rows: by rank, actions as text. spans: by rank, [start, end] of each action, in the simulation's units.
    bubble_ratio: mean over ranks, of the makespan.
    """
    bubbles = timeline.bubbles()
    return json.dumps({
        "kind": schedule.kind,
        "ranks": schedule.positions,
        "microbatches": schedule.microbatches,
        "makespan": timeline.makespan,
        "bubble": [_rounded(bubble) for bubble in bubbles],
        "bubble_ratio": _rounded(sum(bubbles) / len(bubbles) / timeline.makespan),
        "peak_activations": list(peak_activations(schedule)),
        "rows": [[str(action) for action in row] for row in schedule.rows],
        "spans": [[[_rounded(span.start), _rounded(span.end)] for span in row] for row in timeline.rows],
    })


def _rounded(value: float) -> float:
    """Without the last digits of floating-point sums."""
    return round(value, 9)


def _title(schedule: Schedule, timeline: Timeline) -> str:
    ranks = f"{schedule.positions} rank{'s' * (schedule.positions > 1)}"
    microbatches = f"{schedule.microbatches} microbatch{'es' * (schedule.microbatches > 1)}"
    low, high = min(timeline.bubbles()), max(timeline.bubbles())
    bubble, share = f"{high:.4g}", f"{100 * high / timeline.makespan:.1f}"
    if f"{low:.4g}" != bubble:
        bubble, share = f"{low:.4g}–{bubble}", f"{100 * low / timeline.makespan:.1f}–{share}"
    return f"{schedule.kind}: {ranks}, {microbatches}, makespan {timeline.makespan:.6g}, bubble {bubble} ({share} %)"


def _y(position: int) -> int:
    return TOP + position * (BAR + GAP)


def _background(schedule: Schedule, position: int, scale: _Scale) -> list[str]:
    """A rank's name, the stages it hosts, and the grey bar of idle time."""
    y = _y(position)
    stages = [stage_at(schedule.kind, schedule.positions, position, slot) for slot in range(schedule.slots)]
    hosted = ", ".join(str(stage) for stage in stages if stage is not None)
    return [
        f'<text x="16" y="{y + 15}" font-weight="bold">rank {position}</text>',
        f'<text x="16" y="{y + 29}" font-size="10.5" fill="{PALE_INK}">stage{"s" * (len(stages) > 1)} {hosted}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{_px(scale.makespan * scale.per_unit)}" height="{BAR}" fill="{IDLE}"/>',
    ]


def _box(action: Compute | Pair, span: Span, scale: _Scale, y: float) -> list[str]:
    """A box with a half for each of the action's halves, one above the other."""
    x, width = scale.x(span.start), (span.end - span.start) * scale.per_unit
    height = BAR / len(action.halves)
    stages = ", ".join(f"stage {half.stage}" for half in action.halves)
    parts = [f"<g><title>{action} ({stages}), {span.start:.6g} to {span.end:.6g}</title>"]
    for index, half in enumerate(action.halves):
        top, lift = y + index * height, 2 if half.kind in SPLIT else 0
        parts.append(f'<rect x="{_px(x)}" y="{_px(top)}" width="{_px(width)}" height="{_px(height)}" fill="{_fill(half)}"/>')
        if half.kind in SPLIT:
            parts.append(f'<rect x="{_px(x)}" y="{_px(top + height - 4)}" width="{_px(width)}" height="4" '
                         f'fill="{DARK[half.slot % len(DARK)]}"/>')
        if width >= 7 * len(str(half.microbatch)) + 2:
            parts.append(f'<text x="{_px(x + width / 2)}" y="{_px(top + height / 2 + 4 - lift)}" text-anchor="middle" '
                         f'fill="{_ink(half)}">{half.microbatch}</text>')
    parts.append(f'<rect x="{_px(x)}" y="{y}" width="{_px(width)}" height="{BAR}" fill="none" stroke="white" '
                 'stroke-width="1.5"/></g>')
    return parts


def _fill(action: Compute) -> str:
    if action.kind in SPLIT:
        return SPLIT[action.kind]
    return (LIGHT if action.kind is Kind.FORWARD else DARK)[action.slot % len(DARK)]


def _ink(action: Compute) -> str:
    return "white" if action.kind is Kind.BACKWARD else INK


def _axis(scale: _Scale, bottom: int) -> list[str]:
    parts = [f'<text x="16" y="{bottom + 18}" fill="{PALE_INK}">time</text>']
    for number in range(int(scale.makespan / scale.tick + 1e-9) + 1):
        x = _px(scale.x(number * scale.tick))
        parts.append(f'<line x1="{x}" y1="{TOP - 4}" x2="{x}" y2="{bottom + 4}" stroke="{LINE}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle" fill="{PALE_INK}">{number * scale.tick:.6g}</text>')
    return parts


def _legend(schedule: Schedule) -> list[str]:
    """A sample of everything that occurs."""
    present = {(half.kind, half.slot) for row in schedule.rows for action in row for half in action.halves}
    samples = [
        ([_fill(Compute(kind, 0, slot, 0))], f"{NAMES[kind]}{f', direction {slot}' if schedule.slots > 1 else ''}")
        for kind in (Kind.FORWARD, Kind.BACKWARD) for slot in range(schedule.slots) if (kind, slot) in present
    ]
    if any(isinstance(action, Pair) for row in schedule.rows for action in row):
        samples.append(([LIGHT[0], DARK[1 % schedule.slots]], "pair"))
    samples += [([SPLIT[kind]], NAMES[kind]) for kind in SPLIT if any(k is kind for k, _ in present)]
    samples.append(([IDLE], "idle"))
    parts, x = [], 16
    for colours, label in samples:
        for index, colour in enumerate(colours):
            height = 16 // len(colours)
            parts.append(f'<rect x="{x}" y="{50 + index * height}" width="16" height="{height}" fill="{colour}"/>')
        parts.append(f'<text x="{x + 22}" y="62">{label}</text>')
        x += 22 + round(6.3 * len(label)) + 16
    return parts


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
