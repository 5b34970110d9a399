"""An error in a schedule shows the place, with the grid of actions around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 4
"""Actions shown on either side of the place."""


class ScheduleError(ValueError):
    """A schedule or its programs are wrong. `str()`: what and where in the first line, then the grid around it."""


def failure(message: str, rows: Sequence[Sequence[object]], places: Mapping[int, int]) -> ScheduleError:
    """The error `message`, with the actions of all positions in columns around `places`.

    Args:
        rows: actions by position.
        places: index of the marked action by position; one past the end marks the end. Other positions are shown around
            the same index as the first place, unmarked.
    """
    common = next(iter(places.values()), 0)
    windows = [_window(row, places.get(position, common), position in places) for position, row in enumerate(rows)]
    widths = [max((len(window[column]) for window in windows), default=0) for column in range(2 * SHOWN + 1)]
    name = len(str(len(rows) - 1))
    lines = (
        f"  {position:>{name}}: " + " ".join(word.ljust(width) for word, width in zip(window, widths, strict=True)).rstrip()
        for position, window in enumerate(windows)
    )
    return ScheduleError("\n".join((message, *lines)))


def _window(row: Sequence[object], place: int, marked: bool) -> list[str]:
    words = []
    for index in range(place - SHOWN, place + SHOWN + 1):
        word = str(row[index]) if 0 <= index < len(row) else "(end)" if index == len(row) else ""
        words.append(f">{word}<" if marked and index == place else word)
    return words
