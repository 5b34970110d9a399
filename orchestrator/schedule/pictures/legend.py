"""The legend of a picture of a schedule: a sample of everything that occurs, on as many lines as it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.schedule.ir.actions import ActionKind, Pair, Schedule, SplitAction
from orchestrator.schedule.ir.stages import BOTH, V
from orchestrator.schedule.pictures.bars import EXPOSED, HIDDEN, IDLE, REDUCE, action_box, ink, label
from orchestrator.schedule.pictures.geometry import MARGIN, px, rectangle, text_width

SIZE, LINE_HEIGHT, SPACE = 17, 25, 14
NAMES = {
    ActionKind.FORWARD: "forward", ActionKind.BACKWARD: "backward", ActionKind.BACKWARD_INPUT: "backward, input only",
    ActionKind.BACKWARD_WEIGHT: "backward, weights only",
}
SLOTS = {BOTH: "direction", V: "leg"}
"""What a slot is in a placement; else a chunk."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Boxes (kind, slot, text) side by side, one above the other, or in halves, or a plain colour; and what it is."""

    label: str
    boxes: tuple[tuple[ActionKind, int, str], ...] = ()
    stacked: bool = False
    halves: bool = False
    colour: str = ""
    height: int = SIZE

    @property
    def sample_width(self) -> float:
        return SIZE * (len(self.boxes) if self.boxes and not self.stacked else 1)

    @property
    def width(self) -> float:
        return self.sample_width + 6 + text_width(self.label)


def samples(schedule: Schedule, *, exchange: bool, reduced: bool) -> list[Sample]:
    """exchange, reduced: whether there is such communication."""
    actions = {(type(action), tuple((c.kind, c.slot) for c in action.computes)) for row in schedule.rows for action in row}
    present = {compute for _, computes in actions for compute in computes}
    word = SLOTS.get(schedule.stages.placement, "chunk")
    found = []
    for kind, name in NAMES.items():
        slots = sorted(slot for k, slot in present if k is kind)
        if slots and schedule.slots > 1:
            found.append(Sample(f"{name}; number: {word}" if kind is ActionKind.FORWARD else name,
                                tuple((kind, slot, str(slot)) for slot in slots)))
        elif slots:
            found.append(Sample(name, ((kind, 0, ""),)))
    pairs = sorted(computes for shape, computes in actions if shape is Pair)
    splits = sorted(computes for shape, computes in actions if shape is SplitAction)
    if pairs:
        usual = max(pairs, key=lambda pair: ((pair[0][0], pair[1][0]) == (ActionKind.FORWARD, ActionKind.BACKWARD),
                                             pair[0][1] != pair[1][1]))
        found.append(Sample("pair", tuple((kind, slot, "") for kind, slot in usual), stacked=True))
    if splits:
        found.append(Sample("split in two halves", (splits[0][0] + ("",),), halves=True))
    plain = [("communication, hidden", HIDDEN, 7, exchange), ("communication, exposed", EXPOSED, 7, exchange),
             ("gradient reduction", REDUCE, SIZE, reduced), ("idle", IDLE, SIZE, True)]
    return found + [Sample(text, colour=colour, height=height) for text, colour, height, there in plain if there]


def lines(found: Iterable[Sample], width: float) -> list[list[Sample]]:
    """The samples in order, on lines of at most `width` pixels (or of one sample)."""
    rows: list[list[Sample]] = []
    used = 0.0
    for sample in found:
        if not rows or used + sample.width > width:
            rows.append([])
            used = 0.0
        rows[-1].append(sample)
        used += sample.width + SPACE
    return rows


def draw(rows: list[list[Sample]], top: float) -> Iterator[str]:
    for index, row in enumerate(rows):
        x, y = float(MARGIN), top + index * LINE_HEIGHT
        for sample in row:
            yield from _sample(sample, x, y)
            yield f'<text x="{px(x + sample.sample_width + 6)}" y="{px(y + 13)}">{sample.label}</text>'
            x += sample.width + SPACE


def _sample(sample: Sample, x: float, y: float) -> Iterator[str]:
    if sample.colour:
        yield rectangle(x, y + (SIZE - sample.height) / 2, SIZE, sample.height, sample.colour)
    height = SIZE / len(sample.boxes) if sample.stacked else SIZE
    for index, (kind, slot, text) in enumerate(sample.boxes):
        left, top = (x, y + index * height) if sample.stacked else (x + index * SIZE, y)
        yield from action_box(kind, slot, left, top, SIZE, height, halves=sample.halves)
        yield from label(text, left, top, SIZE, height, ink(kind))
