"""A rank whose model is real and whose compute takes set times: every compute segment of a layer does its work, then holds its
lane until so much time has passed as its sequences are to take. What a step takes then follows from the layout and not from how
many ranks share a core; losses, tokens and state are those of the model. The work must be short beside the hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from actors.model.segment import Lane, Segment
from actors.runtime.rank import Rank
from jobs.benches.shared.held_lane import exact_sleep, sleep_until
from jobs.benches.shared.networks import enter
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.placement import Placement

_FIRST = -20  # the highest priority that setpriority(2) knows


@dataclass(frozen=True, slots=True)
class Home:
    """Where a rank lives: a network namespace, None: this one; and its address there."""

    namespace: str | None = None
    address: str = "127.0.0.1"


def held_rank(config: RunConfig, seconds: float, home: Home = Home()) -> Rank:
    """What a process hosts. It goes before other work of the machine: a held lane hardly computes, but must wake in time."""
    if home.namespace is not None:
        enter(home.namespace)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
    exact_sleep()
    return HeldRank(config, home.address, seconds)


class HeldRank(Rank):
    """seconds: of every compute segment of a layer, for each sequence."""

    def __init__(self, config: RunConfig, host: str, seconds: float):
        super().__init__(config, host)
        self._seconds = seconds

    def _set_up(self, placement: Placement) -> None:
        super()._set_up(placement)
        for chunk in self._chunks.values():
            chunk.forward, chunk.backward = self._with_holds(chunk.forward), self._with_holds(chunk.backward)

    def _with_holds(self, segments_of: Callable[..., list[Segment]]) -> Callable[..., list[Segment]]:
        def held(tape: object) -> list[Segment]:
            seconds = self._seconds * tape.sequences
            return [replace(segment, run=_hold(segment.run, seconds)) if segment.lane is Lane.COMPUTE and segment.layer >= 0
                    else segment for segment in segments_of(tape)]
        return held


def _hold(run: Callable[[], None], seconds: float) -> Callable[[], None]:
    def held() -> None:
        deadline = time.perf_counter() + seconds
        run()
        sleep_until(deadline)
    return held
