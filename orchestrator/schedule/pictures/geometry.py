"""Where things go in a picture of a schedule: pixels for times, ranks and text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BAR, STRIP, GAP, BETWEEN = 34, 8, 9, 4                      # heights: bar, communication under it, between ranks, between bars
MARGIN, RIGHT = 16, 28
NARROWEST, WIDEST = 1180, 11000                             # of the whole picture, and of its time axis
BOX = 19                                                    # width that an action wants for its number
FONT, SMALLEST_FONT = 12.0, 7.5
_CHARACTER, _DIGIT = 0.6, 0.64                              # mean width over size, of the widest font that is likely


@dataclass(frozen=True, slots=True)
class Scale:
    """Time to pixels: nearly every action is wide enough for its number, unless the picture would be endless."""

    left: float
    per_unit: float
    makespan: float

    @classmethod
    def of(cls, lengths: Iterable[float], makespan: float, left: float, narrowest: float = NARROWEST) -> Scale:
        """lengths: of what gets a number; a tenth of them may come out too narrow. narrowest: of the whole picture."""
        lengths = sorted(length for length in lengths if length > 0)
        makespan = makespan or 1.0
        short = lengths[len(lengths) // 10] if lengths else makespan
        least = (max(NARROWEST, narrowest) - left - RIGHT) / makespan
        return cls(left, min(max(BOX / short, least), WIDEST / makespan), makespan)

    def x(self, time: float) -> float:
        return self.left + time * self.per_unit

    def width(self, duration: float) -> float:
        return duration * self.per_unit

    @property
    def tick(self) -> float:
        """Distance of marks on the axis: 1, 2 or 5 times a power of ten, at least 40 pixels."""
        power = 10.0 ** -12
        while True:
            for factor in (1, 2, 5):
                if factor * power * self.per_unit >= 40:
                    return factor * power
            power *= 10


@dataclass(frozen=True, slots=True)
class RowHeights:
    """Heights. strip: whether communication is drawn; bars: of each rank (simulated, measured)."""

    top: float
    positions: int
    strip: bool
    bars: int

    @property
    def bar_height(self) -> float:
        return BAR + (STRIP if self.strip else 0)

    @property
    def rank_height(self) -> float:
        return self.bars * self.bar_height + (self.bars - 1) * BETWEEN + GAP

    def y(self, position: int, bar: int = 0) -> float:
        return self.top + position * self.rank_height + bar * (self.bar_height + BETWEEN)

    @property
    def bottom(self) -> float:
        return self.top + self.positions * self.rank_height


def text_width(text: str, size: float = FONT) -> float:
    return _CHARACTER * size * len(text)


def fitting_size(text: str, width: float, height: float) -> float | None:
    """Font size with which `text` fits in a box, at most the usual one; None: it would not be readable."""
    size = min(FONT, (width - 2) / (_DIGIT * max(len(text), 1)), height - 2)
    return size if size >= SMALLEST_FONT else None


def px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def rectangle(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" fill="{fill}"{" " * bool(more)}{more}/>'


def outline(rectangles: Iterable[tuple[float, float, float, float]], more: str) -> list[str]:
    """Many (x, y, width, height) as one path, or nothing."""
    drawn = "".join(f"M{px(x)} {px(y)}h{px(w)}v{px(h)}h{px(-w)}z" for x, y, w, h in rectangles)
    return [f'<path d="{drawn}" {more}/>'] if drawn else []
