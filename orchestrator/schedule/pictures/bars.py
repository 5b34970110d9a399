"""A rank's bar in a picture of a schedule, simulated or measured: boxes above, a thin strip of communication below.

Hue is the slot; shade is the kind: a forward is light, a backward for the input middle, a full backward dark, one for the
weights white with a border. A pair is one box, its first action above; a split action is two halves with notches between
them. Where a rank communicates and does not compute, its box is pale and the strip red.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.schedule.ir.actions import ActionKind, Compute
from orchestrator.schedule.ir.spans import Interval, union
from orchestrator.schedule.pictures.geometry import BAR, STRIP, RowHeights, Scale, fitting_size, outline, px, rectangle

LIGHT = ("#b9d6f2", "#fbd59b", "#c3e4ba", "#e3c6ea", "#b3e2de", "#f6c5cf")
MIDDLE = ("#6fa8df", "#ee9a42", "#78bd72", "#b67fc3", "#56b5ae", "#df7d92")
DARK = ("#24609f", "#b54a08", "#2e7533", "#77348a", "#147470", "#a52d4a")
INK, IDLE, REDUCE = "#1d2733", "#e6eaee", "#8a8f98"
HIDDEN, EXPOSED = "#5f7183", "#d92d27"
PALE = 'fill-opacity="0.45" pointer-events="none"'
_EDGE = 1.6
_GAP = 1.5
"""Pixels: nearer pieces of an action are drawn as one."""
FILLS = {ActionKind.FORWARD: LIGHT, ActionKind.BACKWARD_INPUT: MIDDLE, ActionKind.BACKWARD: DARK}


@dataclass(frozen=True, slots=True)
class Box:
    """One compute action. `share`: (index, count) of the bar's height; `pieces`: when it runs; `halves`: drawn as two."""

    compute: Compute
    title: str
    pieces: tuple[Interval, ...]
    share: tuple[int, int] = (0, 1)
    halves: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """What one rank did. compute, exchange, reduce: when its lanes were busy."""

    boxes: tuple[Box, ...]
    compute: tuple[Interval, ...]
    exchange: tuple[Interval, ...] = ()
    reduce: tuple[Interval, ...] = ()


def draw(bar: Bar, position: int, index: int, scale: Scale, rows: RowHeights) -> Iterator[str]:
    """The `index`-th bar of a rank."""
    y = rows.y(position, index)
    yield rectangle(scale.left, y, scale.width(scale.makespan), BAR, IDLE)
    for box in bar.boxes:
        yield f"<g><title>{escape(box.title)}</title>"
        for place in _places(box, y, scale):
            yield from action_box(box.compute.kind, box.compute.slot, *place, halves=box.halves)
        yield "</g>"
    exposed = list(without(bar.exchange, bar.compute))
    yield from outline(_rectangles(exposed, y, BAR, scale), f'class="pale" fill="white" {PALE}')
    yield from outline(_rectangles(bar.reduce, y, BAR, scale), f'class="reduce" fill="{REDUCE}"')
    for box in bar.boxes:
        widest = max(_places(box, y, scale), key=lambda place: place[2])
        yield from label(str(box.compute.microbatch), *widest, ink(box.compute.kind))
    if rows.strip:
        hidden = without(bar.exchange, exposed)
        yield from outline(_rectangles(hidden, y + BAR + 1, STRIP - 1, scale), f'class="hidden" fill="{HIDDEN}"')
        yield from outline(_rectangles(exposed, y + BAR + 1, STRIP - 1, scale), f'class="exposed" fill="{EXPOSED}"')


def without(intervals: Iterable[Interval], covers: Iterable[Interval]) -> Iterator[Interval]:
    """What of `intervals` no cover covers: disjoint, in order."""
    covers, first = union(covers), 0
    for start, end in union(intervals):
        while first < len(covers) and covers[first][1] <= start:
            first += 1
        cover = first
        while cover < len(covers) and covers[cover][0] < end:
            low, high = covers[cover]
            if low > start:
                yield start, low
            start, cover = high, cover + 1
        if start < end:
            yield start, end


def action_box(kind: ActionKind, slot: int, x: float, y: float, width: float, height: float, *,
               halves: bool = False) -> Iterator[str]:
    """A box of this kind and slot; as two halves side by side with notches between them, if it is split."""
    hue = slot % len(DARK)
    if kind is ActionKind.BACKWARD_WEIGHT:
        border = f'stroke="{DARK[hue]}" stroke-width="1.5"'
        yield rectangle(x + 0.75, y + 0.75, max(width - 1.5, 0.5), height - 1.5, "white", border)
    elif not halves:
        yield rectangle(x, y, width, height, FILLS[kind][hue], f'stroke="white" stroke-width="{_EDGE}"')
    else:
        yield from (rectangle(x + half * width / 2, y, width / 2, height, FILLS[kind][hue]) for half in (0, 1))
        middle, notch = px(x + width / 2), px(height / 5)
        yield from outline([(x, y, width, height)], f'fill="none" stroke="white" stroke-width="{_EDGE}"')
        yield (f'<path d="M{middle} {px(y)}v{notch}M{middle} {px(y + height)}v-{notch}" stroke="{ink(kind)}"/>')


def ink(kind: ActionKind) -> str:
    return "white" if kind is ActionKind.BACKWARD else INK


def label(text: str, x: float, y: float, width: float, height: float, colour: str) -> Iterator[str]:
    """`text` in the middle of a box, if it is readable there."""
    if (size := fitting_size(text, width, height)) is not None:
        yield (f'<text x="{px(x + width / 2)}" y="{px(y + height / 2 + 0.36 * size)}" text-anchor="middle" '
               f'font-size="{px(size)}" fill="{colour}">{text}</text>')


def _places(box: Box, y: float, scale: Scale) -> Iterator[tuple[float, float, float, float]]:
    """(x, y, width, height) of a box's pieces."""
    index, count = box.share
    height = BAR / count
    for start, end in _joined(box.pieces, _GAP / scale.per_unit):
        yield scale.x(start), y + index * height, scale.width(end - start), height


def _joined(pieces: Iterable[Interval], gap: float) -> list[Interval]:
    """Pieces in order, those that are nearer than `gap` as one."""
    found: list[Interval] = []
    for start, end in pieces:
        if found and start - found[-1][1] < gap:
            start = found.pop()[0]
        found.append((start, end))
    return found


def _rectangles(intervals: Sequence[Interval] | Iterable[Interval], y: float, height: float,
                scale: Scale) -> Iterator[tuple[float, float, float, float]]:
    for start, end in intervals:
        yield scale.x(start), y, scale.width(end - start), height
