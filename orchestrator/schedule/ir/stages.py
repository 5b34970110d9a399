"""How the line of stages is folded over the positions of a pipeline.

both   DualPipe: position p hosts stage p and stage P-1-p; microbatches enter at both ends, slot is the direction
v      slots 0 and 1 are the legs of a V (with more chunks, of a zigzag): down the positions, then back up
loop   slot c of position p hosts stage c*P + p; after the last position comes the first one again
Words: slot = which of a position's stages, chunks = stages of a position that one microbatch passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

from orchestrator.refusal import ConfigError

Place = tuple[int, int]
"""(position, slot)."""

BOTH, V, LOOP = "both", "v", "loop"
PLACEMENTS = (BOTH, V, LOOP)
FORWARD_ONLY = "forward_only"
"""The kind of schedule without backward passes."""
SEARCHED = "searched"
"""The kind of schedule that a search finds."""


@dataclass(frozen=True)
class Stages:
    """`chunks`: 1 with `both`, even with `v`, any positive number with `loop`.

    Raises ConfigError (a ValueError) with key `placement`, `positions` or `chunks`: others.
    """

    placement: str
    positions: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError("placement", self.placement, f"one of {', '.join(PLACEMENTS)}")
        if self.positions < 1:
            raise ConfigError("positions", self.positions, "at least 1")
        if self.chunks < 1 or (self.placement == BOTH and self.chunks > 1) or (self.placement == V and self.chunks % 2):
            allowed = {BOTH: "1", V: "an even number", LOOP: "at least 1"}[self.placement]
            raise ConfigError("chunks", self.chunks, f"{allowed} with placement {self.placement}")

    @property
    def count(self) -> int:
        """Stages of the model."""
        return self.positions * self.chunks

    @property
    def slots(self) -> int:
        """Stages that a position hosts. In a DualPipe pipeline of one position both directions would be the same."""
        return 2 if self.placement == BOTH and self.positions > 1 else self.chunks

    @cached_property
    def paths(self) -> tuple[tuple[Place, ...], ...]:
        """The ways through the pipeline, one for each entrance: a (position, slot) for each stage, in stage order.

        The microbatches of a step are dealt evenly to the entrances.
        """
        down = tuple((position, 0) for position in range(self.positions))
        if self.placement == BOTH:
            up = tuple((position, 1) for position in reversed(range(self.positions)))
            return (down, up) if self.positions > 1 else (down,)
        legs = []
        for chunk in range(self.chunks):
            leg = [(position, chunk) for position, _ in down]
            legs += leg[::-1] if self.placement == V and chunk % 2 else leg
        return (tuple(legs),)

    @property
    def entrances(self) -> tuple[int, ...]:
        """Slot in which each path's microbatches are named and enter."""
        return tuple(path[0][1] for path in self.paths)

    def shared_evenly(self, wanted: int) -> int:
        """The smallest number of a step's microbatches that the entrances can share evenly and that is at least `wanted`."""
        return max(1, -(-wanted // len(self.paths))) * len(self.paths)

    def route(self, slot: int) -> tuple[Place, ...] | None:
        """The path of the microbatches that are found in `slot`; None: there is no such slot."""
        if not 0 <= slot < self.slots:
            return None
        return self.paths[slot if self.placement == BOTH else 0]

    def stage_at(self, position: int, slot: int) -> int | None:
        """The stage that `position` hosts in `slot`, if any."""
        return _stage_of(self).get((position, slot))

    def hosted(self, position: int) -> tuple[int, ...]:
        """Stages of a position, by slot."""
        return tuple(self.stage_at(position, slot) for slot in range(self.slots))

    def handovers(self, position: int) -> dict[int, int]:
        """Slots of a position whose input is the output of another of its slots, with that slot: where a V turns round, or a
        loop has one position."""
        steps = (step for path in self.paths for step in pairwise(path))
        return {after: before for (origin, before), (target, after) in steps if origin == target == position}

    def holders(self, stage: int) -> tuple[int, ...]:
        """Positions that host `stage`: two with `both` (a position and its mirror), else one."""
        return tuple(sorted({path[stage][0] for path in self.paths}))


@cache
def _stage_of(stages: Stages) -> dict[Place, int]:
    return {place: stage for path in stages.paths for stage, place in enumerate(path)}
