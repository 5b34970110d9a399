"""What a simulated run is made of: as data, so that a failing one can be written down in one line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Goal
from orchestrator.protocol.members import MembershipRules


@dataclass(frozen=True, slots=True)
class Fault:
    """at: the number of the event before which it comes. target: chooses whom, among those there are. later: seconds after
    that."""

    at: int
    kind: str
    target: int = 0
    later: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """seed: of delays and chances. nodes: ranks of each. steps .. place_every: of the goal. spread: of delays, 1: a healthy
    network.

    cold: no process is there when the run begins. wait: `elastic.wait_seconds`; None: for ever.
    """

    seed: int = 0
    nodes: tuple[int, ...] = (1, 1, 1)
    steps: int = 6
    save_every: int = 3
    validate_every: int = 0
    place_every: int = 0
    min_nodes: int = 1
    least: int = 1
    copies: int = 1
    keys: int = 4
    spread: float = 1.0
    cold: bool = False
    wait: float | None = None
    faults: tuple[Fault, ...] = ()

    def goal(self) -> Goal:
        return Goal(self.steps, self.save_every, self.validate_every, self.place_every, keep=2, validate=self.validate_every > 0)

    def rules(self) -> MembershipRules:
        return MembershipRules(self.min_nodes, None, SILENCE, COOL_DOWN)

    def bounds(self) -> Deadlines:
        return BOUNDS if self.wait is None else replace(BOUNDS, wait=self.wait)


SILENCE = 6.0
COOL_DOWN = 2.0
BOUNDS = Deadlines(silence=SILENCE, start=60.0, adopt=SILENCE + 3.0, release=16.0, making=24.0, finish=40.0, form=60.0, load=60.0, step=90.0,
                   stuck=12.0, stuck_times=10.0, files=60.0, probe=4.0, storage=120.0, give_up=1200.0, wait=None, first_pause=0.1,
                   last_pause=10.0, recall=4.0)
