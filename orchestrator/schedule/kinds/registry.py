"""The schedules there are, by the name that a user gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.stages import chunks_of
from orchestrator.schedule.kinds import dualpipe, dualpipev
from orchestrator.schedule.kinds.interleaved import INTERLEAVED, MERGED, interleaved_1f1b, merged_interleaved_1f1b
from orchestrator.schedule.kinds.one_f_one_b import GPIPE, ONE_F_ONE_B, gpipe, one_f_one_b
from orchestrator.schedule.kinds.sizes import Sizes
from orchestrator.schedule.kinds.zero_bubble import ZB_H1, ZBV, zb_h1, zbv


@dataclass(frozen=True, slots=True)
class _Generator:
    """`make` takes positions, microbatches and, if the number of chunks is free, chunks."""

    make: Callable[..., Schedule]
    sizes: Sizes


_GENERATORS = {generator.sizes.kind: generator for generator in (
    _Generator(dualpipe.dualpipe, dualpipe.SIZES),
    _Generator(dualpipev.dualpipev, dualpipev.SIZES),
    _Generator(zb_h1, ZB_H1),
    _Generator(zbv, ZBV),
    _Generator(one_f_one_b, ONE_F_ONE_B),
    _Generator(interleaved_1f1b, INTERLEAVED),
    _Generator(merged_interleaved_1f1b, MERGED),
    _Generator(gpipe, GPIPE),
)}
KINDS: tuple[str, ...] = tuple(_GENERATORS)


def generate(kind: str, positions: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of that kind for a step of `microbatches`, all entrances together.

    chunks: stages of a position that a microbatch passes, for the interleaved kinds (None: 2); others take their own only.
    Raises ConfigError (a ValueError) with key `kind`, `positions`, `microbatches` or `chunks`.
    """
    generator = _generator(kind, chunks)
    free = () if chunks is None or chunks_of(kind) else (chunks,)
    return generator.make(positions, microbatches, *free)


def smallest_microbatches(kind: str, positions: int, wanted: int, chunks: int | None = None) -> int:
    """The smallest number of microbatches that the kind takes and that is at least `wanted`.

    Raises ConfigError with key `kind`, `positions` or `chunks`.
    """
    return _generator(kind, chunks).sizes.smallest(positions, wanted)


def _generator(kind: str, chunks: int | None) -> _Generator:
    if kind not in _GENERATORS:
        raise ConfigError("kind", kind, f"one of {', '.join(KINDS)}")
    own = chunks_of(kind)
    if chunks is not None and (chunks < 1 or chunks != (own or chunks)):
        raise ConfigError("chunks", chunks, f"{kind} takes {own or 'at least 1'}")
    return _GENERATORS[kind]
