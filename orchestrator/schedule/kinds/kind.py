"""What a kind of schedule is: one value that answers whatever others ask about it by name.

Contract: a kind that lacks something, or says what cannot be, is refused when it is made (`IncompleteKind`), so a module that
registers one cannot be imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import Row, Schedule
from orchestrator.schedule.ir.stages import BOTH, LOOP, PLACEMENTS, Stages, V

Generator = Callable[[Stages, int], tuple[Row, ...]]
"""From where the stages are and the microbatches of a step, all entrances together, to the row of each position."""

_NAME = re.compile(r"[a-z0-9_]+")
_NOT_GIVEN: Any = object()
_USUAL_CHUNKS = 2


class IncompleteKind(ValueError):
    """A kind is half registered. `str()`: its name and what is missing or wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleKind:
    """All of it must be given. Raises IncompleteKind: it is not, or is of the wrong sort.

    name: as a user gives it, `schedule.kind`. meaning: one line of help.
    stage_placement: one of `PLACEMENTS`; None: whoever uses the kind chooses.
    chunks: stages of a position that a microbatch passes; None: whoever uses the kind chooses.
    fewest_microbatches: of a step, all entrances together, by the number of positions.
    generator: None: its schedules are searched for.
    instead: kinds that a run takes, the first that can be had, when its pipeline gets too short for this one.
    predicts_searched: whether its duration is taken for that of a searched schedule with the same stages.
    torch: name of the class of torch.distributed.pipelining that runs the same order; None: there is none.
    """

    name: str = _NOT_GIVEN
    meaning: str = _NOT_GIVEN
    stage_placement: str | None = _NOT_GIVEN
    chunks: int | None = _NOT_GIVEN
    fewest_microbatches: Callable[[int], int] = _NOT_GIVEN
    generator: Generator | None = _NOT_GIVEN
    instead: tuple[str, ...] = _NOT_GIVEN
    predicts_searched: bool = _NOT_GIVEN
    torch: str | None = _NOT_GIVEN

    def __post_init__(self) -> None:
        if missing := [name for name in self.__dataclass_fields__ if getattr(self, name) is _NOT_GIVEN]:
            raise IncompleteKind(f"schedule kind {self._called()}: no {', no '.join(missing)}")
        for name, wrong in (
            ("name", not (isinstance(self.name, str) and _NAME.fullmatch(self.name))),
            ("meaning", not (isinstance(self.meaning, str) and self.meaning.strip()) or len(self.meaning.splitlines()) > 1),
            ("stage_placement", self.stage_placement not in (None, *PLACEMENTS)),
            ("chunks", self.chunks is not None and not self._placed_in(self.chunks)),
            ("fewest_microbatches", not callable(self.fewest_microbatches)),
            ("generator", self.generator is not None and not callable(self.generator)),
            ("instead", not isinstance(self.instead, tuple)),
            ("predicts_searched", not isinstance(self.predicts_searched, bool)),
            ("torch", not isinstance(self.torch, str | None)),
        ):
            if wrong:
                raise IncompleteKind(f"schedule kind {self._called()}: {name} = {getattr(self, name)!r} is none")

    def _called(self) -> str:
        return "without a name" if self.name is _NOT_GIVEN else str(self.name)

    def _placed_in(self, chunks: int) -> bool:
        """Whether the placement takes so many chunks; a kind with any placement has as many as that."""
        try:
            return self.stage_placement is not None and bool(Stages(self.stage_placement, 1, chunks))
        except ConfigError:
            return False

    @property
    def searched(self) -> bool:
        return self.generator is None

    def takes(self, positions: int) -> bool:
        """Whether there is such a schedule for a pipeline of so many positions."""
        return _mirrored(positions) if self.stage_placement == BOTH else positions >= 1

    def stages(self, positions: int, chunks: int | None = None, placement: str | None = None) -> Stages:
        """Where the stages live. None: the kind's own; where it leaves a choice, two chunks in a loop, and of placements both
        ends, or a loop where these would need an even number of positions.

        Raises ConfigError (a ValueError) with key `positions`, `chunks` or `placement`: what the kind does not take.
        """
        for key, given, own in (("placement", placement, self.stage_placement), ("chunks", chunks, self.chunks)):
            if own is not None and given not in (None, own):
                raise ConfigError(key, given, f"{self.name} takes {own}")
        wanted = self.stage_placement or placement or (BOTH if _mirrored(positions) else LOOP)
        if positions < 1 or (wanted == BOTH and not _mirrored(positions)):
            allowed = "1 or an even number" if wanted == BOTH else "at least 1"
            chosen = f" with placement {placement}" if placement and not self.stage_placement else ""
            raise ConfigError("positions", positions, f"{self.name} takes {allowed}{chosen}")
        usual = {BOTH: 1, V: 2}.get(wanted, _USUAL_CHUNKS if self.stage_placement else 1)
        return Stages(wanted, positions, next(number for number in (self.chunks, chunks, usual) if number is not None))

    def fits(self, stages: Stages) -> bool:
        """Whether it has its stages there, or may have."""
        return (self.stage_placement in (None, stages.placement) and self.chunks in (None, stages.chunks)
                and (stages.placement != BOTH or _mirrored(stages.positions)))

    def smallest_microbatches(self, stages: Stages, wanted: int) -> int:
        """The smallest number of a step's microbatches that the kind takes there and that is at least `wanted`."""
        return stages.shared_evenly(max(wanted, self.fewest_microbatches(stages.positions)))

    def schedule(self, stages: Stages, microbatches: int) -> Schedule:
        """The schedule of a step of `microbatches`, all entrances together, of a kind that is not searched for.

        Raises ConfigError (a ValueError) with key `microbatches`: a number that the kind does not take.
        """
        if self.smallest_microbatches(stages, microbatches) != microbatches:
            raise ConfigError("microbatches", microbatches, f"{self.name} takes {self._allowed(stages)}")
        return Schedule(self.name, stages, microbatches, self.generator(stages, microbatches))

    def _allowed(self, stages: Stages) -> str:
        least = self.smallest_microbatches(stages, 1)
        each, odd = divmod(least, stages.positions)
        why = f" ({each} x positions)" if self.fewest_microbatches(stages.positions) > 1 < stages.positions and not odd else ""
        return f"{'an even number, ' if len(stages.paths) > 1 else ''}at least {least}{why}"

    @property
    def hosted(self) -> str:
        """Stages of a rank, in words."""
        if self.stage_placement is None:
            return "any of these placements"
        form = {BOTH: "2 (a stage and its mirror)", V: f"{self.chunks} (legs of a V)", LOOP: str(self.chunks)}
        return "`schedule.chunks`" if self.chunks is None else form[self.stage_placement]


def _mirrored(positions: int) -> bool:
    """Whether each position can have a mirror image, or needs none."""
    return positions == 1 or (positions > 1 and positions % 2 == 0)
