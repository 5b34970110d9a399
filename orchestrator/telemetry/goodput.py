"""Where a run's wall time goes, and how much of it trains.

Time is attributed where it passes: at any moment a run does one thing. A committed step is taken apart by what its ranks measured.
The step that a loss interrupted counts as recovery, for it is done again; so do steps that a way back to a checkpoint undoes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

STEP = "step"
"""A step under way: not yet known whether it counts."""
USEFUL, EXPOSED, BUBBLE, COORDINATION = "useful", "exposed_communication", "bubble", "coordination"
DATA, VALIDATION, CHECKPOINT, PLACEMENT, RECOVERY = "data", "validation", "checkpoint", "placement", "recovery"
KINDS = (USEFUL, EXPOSED, BUBBLE, COORDINATION, DATA, VALIDATION, CHECKPOINT, PLACEMENT, RECOVERY)


class TimeAccount:
    """`now`: seconds of any one clock. Not thread-safe."""

    def __init__(self, now: float):
        self._kind, self._since = RECOVERY, now  # until the first generation stands
        self._spent = dict.fromkeys((STEP, *KINDS), 0.0)

    def enter(self, kind: str, now: float) -> str:
        """From now on time goes to `kind`; what it went to before."""
        before = self._kind
        self._spent[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    def step_lost(self) -> None:
        """The step under way will be done again."""
        self._spent[RECOVERY] += self._spent[STEP]
        self._spent[STEP] = 0.0

    def redone(self, seconds: float) -> None:
        """So much time went to steps that will be done again, though it has been told as theirs."""
        self._spent[RECOVERY] += seconds

    def step_done(self, now: float, compute: float, exposed: float, bubble: float) -> dict[str, float]:
        """Seconds of every kind since the last time, all together the wall time between. compute, exposed, bubble: of the step,
        means over ranks; what is left of it went to calls, updates and waiting for the slowest rank."""
        self.enter(self._kind, now)
        step = self._spent.pop(STEP)
        share = min(1.0, step / total) if (total := compute + exposed + bubble) else 0.0
        parts = {USEFUL: compute * share, EXPOSED: exposed * share, BUBBLE: bubble * share}
        found = {kind: self._spent[kind] + parts.get(kind, 0.0) for kind in KINDS}
        found[COORDINATION] += max(0.0, step - sum(parts.values()))
        self._spent = dict.fromkeys((STEP, *KINDS), 0.0)
        return found


def totals(spent: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of every kind, all together."""
    found = dict.fromkeys(KINDS, 0.0)
    for of_step in spent:
        for kind, seconds in of_step.items():
            found[kind] = found.get(kind, 0.0) + seconds
    return found


def goodput(spent: Mapping[str, float]) -> float | None:
    """Useful time ÷ wall time, 0..1; None: no time has passed."""
    total = sum(spent.values())
    return spent[USEFUL] / total if total else None
