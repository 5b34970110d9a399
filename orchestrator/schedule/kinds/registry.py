"""The one table of the kinds of schedules: whoever wants to know what a kind is, or which there are, derives it from here.

To add a kind: a generator in a module of this folder, and one entry in `TABLE`. Configuration, planner, search, relayout,
benches, help and the table in docs/schedules.md follow; a kind that is half registered cannot be imported.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.stages import BOTH, LOOP, SEARCHED, Stages, V
from orchestrator.schedule.kinds.dualpipe import dualpipe
from orchestrator.schedule.kinds.dualpipev import dualpipev
from orchestrator.schedule.kinds.interleaved import interleaved_1f1b, merged_interleaved_1f1b
from orchestrator.schedule.kinds.kind import IncompleteKind, ScheduleKind
from orchestrator.schedule.kinds.one_f_one_b import gpipe, one_f_one_b
from orchestrator.schedule.kinds.zero_bubble import zb_h1, zbv

_ANY_PIPELINE = ("zb_h1", "1f1b")
"""Kinds for a pipeline of any length whose positions have one stage each."""


def table(kinds: Iterable[ScheduleKind]) -> dict[str, ScheduleKind]:
    """By name. Raises IncompleteKind: a name is there twice, or a kind that another names is not there, or is searched for."""
    found: dict[str, ScheduleKind] = {}
    for kind in kinds:
        if kind.name in found:
            raise IncompleteKind(f"schedule kind {kind.name}: there is another of this name")
        found[kind.name] = kind
    for kind in found.values():
        for other in kind.instead:
            if other not in found or found[other].searched:
                raise IncompleteKind(f"schedule kind {kind.name}: instead = {kind.instead!r} has {other!r}, which is no kind "
                                     "with a generator")
    return found


def _one(positions: int) -> int:
    return 1


def _two_each(positions: int) -> int:
    return 2 * positions


TABLE = table((
    ScheduleKind(
        name="dualpipe", meaning="DeepSeek-V3's: microbatches enter at both ends; steady state of pairs F|B",
        stage_placement=BOTH, chunks=1, generator=dualpipe,
        fewest_microbatches=lambda positions: 1 if positions == 1 else 2 * positions,  # alone it has one direction
        instead=("dualpipev", *_ANY_PIPELINE), predicts_searched=True, torch=None),
    ScheduleKind(
        name="dualpipev",
        meaning="the same on half the ranks, without the second copy of the parameters; any number of ranks",
        stage_placement=V, chunks=2, generator=dualpipev, fewest_microbatches=_two_each,
        instead=_ANY_PIPELINE, predicts_searched=True, torch="ScheduleDualPipeV"),
    ScheduleKind(
        name="zb_h1", meaning="zero bubble: a backward is split in I (input) and W (weights), and W fills the gaps of 1f1b",
        stage_placement=LOOP, chunks=1, generator=zb_h1, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=False, torch=None),
    ScheduleKind(
        name="zbv", meaning="zero bubble in a V: no rank idles between its first and its last action",
        stage_placement=V, chunks=2, generator=zbv, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=False, torch="ScheduleZBVZeroBubble"),
    ScheduleKind(
        name="1f1b", meaning="a forward and a backward in turn, once the pipeline is filled",
        stage_placement=LOOP, chunks=1, generator=one_f_one_b, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=True, torch="Schedule1F1B"),
    ScheduleKind(
        name="interleaved_1f1b", meaning="Megatron's: chunk c of rank r is stage c·P + r",
        stage_placement=LOOP, chunks=None, generator=interleaved_1f1b, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=True, torch="ScheduleInterleaved1F1B"),
    ScheduleKind(
        name="merged_interleaved_1f1b",
        meaning="one more warm-up forward, so that steady-state F and B are pairs (Megatron's overlap of expert communication)",
        stage_placement=LOOP, chunks=None, generator=merged_interleaved_1f1b, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=False, torch=None),
    ScheduleKind(
        name="gpipe", meaning="all forwards, then all backwards",
        stage_placement=LOOP, chunks=1, generator=gpipe, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=False, torch="ScheduleGPipe"),
    ScheduleKind(
        name=SEARCHED, meaning="found for your costs, your memory and your number of microbatches",
        stage_placement=None, chunks=None, generator=None, fewest_microbatches=_one,
        instead=_ANY_PIPELINE, predicts_searched=False, torch=None),
))
NAMES = tuple(TABLE)
"""What `schedule.kind` may be."""
KINDS = tuple(name for name, kind in TABLE.items() if not kind.searched)
"""Those that have a generator."""


def kind_of(name: str, allowed: Iterable[str] = NAMES) -> ScheduleKind:
    """Raises ConfigError with key `kind`: none of `allowed`."""
    if name not in allowed:
        raise ConfigError("kind", name, f"one of {', '.join(allowed)}")
    return TABLE[name]


def documented() -> list[str]:
    """The table of docs/schedules.md, line by line."""
    rows = (f"| `{kind.name}` | {kind.hosted} | {kind.meaning} |".replace("F|B", "F\\|B") for kind in TABLE.values())
    return ["| `schedule.kind` | stages of a rank | what it is |", "| --- | --- | --- |", *rows]


def stages_of(kind: str, positions: int, chunks: int | None = None, placement: str | None = None) -> Stages:
    """`ScheduleKind.stages`. Raises ConfigError as it does, and with key `kind`."""
    return kind_of(kind).stages(positions, chunks, placement)


def generate(kind: str, positions: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of that kind for a step of `microbatches`, all entrances together.

    chunks: stages of a position that a microbatch passes, for the interleaved kinds (None: 2); others take their own only.
    Raises ConfigError (a ValueError) with key `kind`, `positions`, `microbatches` or `chunks`.
    """
    found = kind_of(kind, KINDS)
    return found.schedule(found.stages(positions, chunks), microbatches)


def smallest_microbatches(kind: str, positions: int, wanted: int, chunks: int | None = None) -> int:
    """The smallest number of microbatches that the kind takes and that is at least `wanted`.

    Raises ConfigError with key `kind`, `positions` or `chunks`.
    """
    found = kind_of(kind, KINDS)
    return found.smallest_microbatches(found.stages(positions, chunks), wanted)


def has_chosen_placement(kind: str) -> bool:
    """Whether the name of the kind does not say where its stages are. A name that is not in the table is of no such kind."""
    return kind in TABLE and TABLE[kind].stage_placement is None
