"""Our schedules, run by our executor, against our simulator and against torch.distributed.pipelining.

Every rank is a process; a stage holds its rank's compute lane for set times instead of computing, and hands on real tensors.
All contestants run in the same processes, in turn, each as often as the others; every repeat is reported. The simulator is
given the durations of the holds and the cost of a hop, which a ping-pong measures before the first step.
"""

from __future__ import annotations

import itertools
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from actors.hosts.processes import ProcessRanks
from actors.hosts.seated_answers import call
from actors.telemetry.trace import trace_json
from jobs.benches.schedule.rank import HeldStep, ScheduleTask, schedule_rank
from jobs.benches.schedule.torch_peer import CHUNKS
from jobs.benches.shared.held_lane import expected_sums
from orchestrator.config.run_config import Real, RunConfig, Section
from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.spans import Span
from orchestrator.schedule.ir.stages import SEARCHED, Stages
from orchestrator.schedule.kinds.registry import KINDS, TABLE, generate, stages_of
from orchestrator.schedule.search import searched
from orchestrator.schedule.search.portfolio import EFFORT
from orchestrator.schedule.timing.durations import Durations, per_chunk
from orchestrator.schedule.timing.simulate import simulate

SAME = {kind: TABLE[kind].torch for kind in KINDS if TABLE[kind].torch}
"""Kinds that both sides have."""
SLOWER_THAN_SIMULATED, FASTER_THAN_TORCH = 1.03, 1.15
_SEARCH = re.compile(r"(both|v|loop)(?:/([1-9][0-9]*))?(?:<=([0-9]+(?:\.[0-9]+)?))?")
_TIMEOUT_SECONDS = 300.0
_LEAD_SECONDS = 0.02
_WARM_UP = 0.02
"""Durations of the uncounted step of every contestant, as a share: connections, buffers and code are warm after it."""


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    ranks: int = Field(8, ge=2)
    microbatches: list[int] = Field([20, 32], min_length=1)
    kibibytes: list[int] = Field([64, 1024], min_length=1, description="of a message")
    milliseconds: Real = Field(20.0, gt=0, description="of each of F, I and W on a whole rank")
    repeats: int = Field(5, ge=1)
    kinds: list[Literal[KINDS]] = Field([*KINDS], description="ours")
    searched: list[str] = Field(["both", "v"], description="ours, found for the bench's durations: placement, or v/4 with "
                                "chunks, or both<=12 with the most activations")
    effort: int = Field(EFFORT, ge=1, description="of each search")
    torch: list[Literal[tuple(CHUNKS)]] = Field([name for name in CHUNKS if name != "ScheduleGPipe"],
                                                description="classes of torch.distributed.pipelining")
    trace: str | None = Field(None, description="file for the spans of a repeat of each of ours")


@dataclass(frozen=True)
class Block:
    """Steps that differ in the contestant only.

    ours: schedules by name; simulated: seconds of a step of each. bound: seconds that no schedule of the searched placements
    is below; None: nothing was searched.
    """

    microbatches: int
    kibibytes: int
    ours: dict[str, Schedule]
    torch: list[str]
    simulated: dict[str, float]
    bound: float | None = None

    @property
    def name(self) -> str:
        return f"{self.microbatches} microbatches, {self.kibibytes} KiB"


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Step times, what they are compared with, and whether the bars hold. Raises ConfigError."""
    started, spans = time.perf_counter(), {}
    searches = _searches(settings)
    bounds: dict[int, float] = {}
    schedules = {m: {kind: generate(kind, settings.ranks, m) for kind in settings.kinds} for m in settings.microbatches}
    with ProcessRanks(config, settings.ranks, schedule_rank, start_method="forkserver") as ranks:
        _everywhere(ranks, "open", settings.ranks, _free_port(), numbered=True)
        costs = _costs(ranks, settings)
        hops = {kibibytes: costs["hop_seconds"][f"{kibibytes} KiB"]["ours"] for kibibytes in settings.kibibytes}
        for m, (name, (stages, most)) in itertools.product(settings.microbatches, searches.items()):
            durations = per_chunk(_durations(settings, min(hops.values())), stages)
            found = searched(stages, m, durations, most, splits=False, effort=settings.effort)
            schedules[m][name], bounds[m] = found.schedule, min(found.lower_bound, bounds.get(m, found.lower_bound))
        costs["executor_seconds_per_action"] = _executor_costs(ranks, schedules[settings.microbatches[0]])
        print(f"costs: {costs}", file=sys.stderr, flush=True)
        blocks = [_block(settings, m, schedules[m], kibibytes, hops[kibibytes], bounds.get(m))
                  for m, kibibytes in itertools.product(settings.microbatches, settings.kibibytes)]
        measured = {block.name: _measure(ranks, settings, block, spans if settings.trace and block is blocks[0] else None)
                    for block in blocks}
    if settings.trace:
        Path(settings.trace).write_text(trace_json(spans), encoding="utf-8")
    seconds = {name: taken for name, (taken, _) in measured.items()}
    costs["latest_start_seconds"] = max(late for _, late in measured.values())
    results = {block.name: compare(settings, block, seconds[block.name]) for block in blocks}
    checks: dict[str, bool] = {}
    for block in blocks:
        checks |= verdicts(block, results[block.name], smallest=block.kibibytes == min(settings.kibibytes))
    return {"settings": settings.model_dump(), "seconds": seconds, "costs": costs, "results": results,
            "ratio": {name: found["best"]["torch/ours"] for name, found in results.items() if "best" in found},
            "bars": {"measured/simulated": SLOWER_THAN_SIMULATED, "torch/ours": FASTER_THAN_TORCH},
            "run_seconds": time.perf_counter() - started, "checks": checks, "valid": all(checks.values())}


def _block(settings: Settings, microbatches: int, ours: dict[str, Schedule], kibibytes: int, hop: float,
           bound: float | None) -> Block:
    durations = _durations(settings, hop)
    simulated = {name: simulate(schedule, per_chunk(durations, schedule.stages)).makespan for name, schedule in ours.items()}
    return Block(microbatches, kibibytes, ours, settings.torch, simulated, bound)


def _searches(settings: Settings) -> dict[str, tuple[Stages, float | None]]:
    """What to search for, by name: where the stages are, and the most activations. Raises ConfigError."""
    found = {}
    for text in settings.searched:
        match = _SEARCH.fullmatch(text)
        try:
            stages = stages_of(SEARCHED, settings.ranks, int(match[2]) if match[2] else None, match[1]) if match else None
        except ValueError:
            stages = None
        if stages is None:
            raise ConfigError("searched", text, "a placement (both, v, loop) as v, v/4 with chunks, or v/4<=12 with activations")
        found[f"{SEARCHED} {text}"] = (stages, float(match[3]) if match[3] else None)
    return found


def _durations(settings: Settings, hop: float) -> Durations:
    seconds = settings.milliseconds / 1000
    return Durations(forward=seconds, backward_input=seconds, backward_weight=seconds, hop=hop)


# --- measuring ---------------------------------------------------------------------------------------------------------


def _measure(ranks: ProcessRanks, settings: Settings, block: Block,
             traced: dict[int, list[Span]] | None) -> tuple[dict[str, list[float]], float]:
    """Seconds of every repeat by contestant; how late a rank began at worst.

    Raises RuntimeError: a contestant did other work than its schedule says.
    """
    tasks = _tasks(block, settings.ranks)
    _everywhere(ranks, "prepare", block.kibibytes * 256, settings.milliseconds / 1000, each=tasks)
    names = [*block.ours, *block.torch]
    for name in names:
        _step(ranks, block, name, _WARM_UP)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    late = 0.0
    for repeat in range(settings.repeats):
        at = repeat * len(names) // settings.repeats
        for name in names[at:] + names[:at]:
            wanted = traced is not None and repeat == 0 and name in block.ours
            taken, steps = _step(ranks, block, name, 1.0, wanted)
            seconds[name].append(taken)
            late = max(late, *(step.late for step in steps))
            if wanted:
                traced[len(traced)] = [span for step in steps for span in step.spans]
        print(f"{block.name}, repeat {repeat}: " + ", ".join(f"{name} {seconds[name][-1]:.3f}" for name in names),
              file=sys.stderr, flush=True)
    return seconds, late


def _tasks(block: Block, ranks: int) -> list[dict[str, ScheduleTask | int]]:
    """By rank: what each contestant runs there."""
    programs = {name: lower(schedule) for name, schedule in block.ours.items()}
    for name, schedule in block.ours.items():
        check(schedule, programs[name])
    return [{name: ScheduleTask(schedule.stages, block.microbatches, programs[name][rank]) for name, schedule in block.ours.items()}
            | dict.fromkeys(block.torch, block.microbatches) for rank in range(ranks)]


def _step(ranks: ProcessRanks, block: Block, name: str, factor: float, traced: bool = False) -> tuple[float, list[HeldStep]]:
    _everywhere(ranks, "ready", name, factor)
    start = time.perf_counter() + _LEAD_SECONDS
    steps: list[HeldStep] = _everywhere(ranks, "go", start, traced)
    stages = ranks.size * CHUNKS[name] if name in CHUNKS else block.ours[name].stages.count
    entrances = 1 if name in CHUNKS else len(block.ours[name].stages.paths)
    sums = {kind: sum(step.sums[kind] for step in steps) for kind in ("F", "I")}
    holds = sum(step.holds for step in steps)
    if sums != expected_sums(block.microbatches, entrances, stages) or holds != 3 * block.microbatches * stages:
        raise RuntimeError(f"{name}, {block.name}: {holds} holds, sums {sums}: not the work of a step")
    if wrong := [rank for rank, step in enumerate(steps) if not step.in_order]:
        raise RuntimeError(f"{name}, {block.name}: ranks {wrong} held their lanes in another order than the schedule's")
    return max(step.end for step in steps) - start, steps


def _costs(ranks: ProcessRanks, settings: Settings) -> dict[str, Any]:
    """In seconds: how much too long a hold is, on all ranks at once, and one hop, between two ranks (medians)."""
    seconds = settings.milliseconds / 1000
    overshoot = sorted(itertools.chain(*_everywhere(ranks, "hold_overshoot", seconds, 50)))
    hops: dict[str, dict[str, float]] = {}
    for kibibytes, way in itertools.product(settings.kibibytes, ("ours", "torch")):
        one, other, *_ = _everywhere(ranks, "ping_pong", way, kibibytes * 256, seconds / 4, 100)
        taken = [max(a[1], b[1]) - max(a[0], b[0]) for a, b in zip(one, other)]
        hops.setdefault(f"{kibibytes} KiB", {})[way] = statistics.median(taken)
    return {"hold_overshoot_seconds": {"median": statistics.median(overshoot), "max": overshoot[-1]}, "hop_seconds": hops}


def _executor_costs(ranks: ProcessRanks, schedules: dict[str, Schedule]) -> dict[str, float]:
    """The executor's own seconds an action, by schedule: the median run of the first position, where nothing takes time."""
    found = {}
    for name, schedule in schedules.items():
        task = ScheduleTask(schedule.stages, schedule.microbatches, lower(schedule)[0])
        found[name] = statistics.median(call(ranks, "executor_cost", [(task, 30)], _TIMEOUT_SECONDS)[0])
    return found


def _everywhere(ranks: ProcessRanks, method: str, *arguments: Any, numbered: bool = False, each: list | None = None) -> list:
    """Call all ranks. numbered: with the rank as first argument; each: with one argument of its own first."""
    own = [(rank,) for rank in range(ranks.size)] if numbered else [(value,) for value in each] if each else [()] * ranks.size
    return call(ranks, method, [(*first, *arguments) for first in own], _TIMEOUT_SECONDS)


# --- comparing ---------------------------------------------------------------------------------------------------------


def compare(settings: Settings, block: Block, seconds: dict[str, list[float]]) -> dict[str, Any]:
    ideal = 3 * block.microbatches * settings.milliseconds / 1000
    found: dict[str, Any] = {"ideal_seconds": ideal, "contestants": {}, "pairs": {}}
    for name, taken in seconds.items():
        median = statistics.median(taken)
        entry = {"median": median, "min": min(taken), "max": max(taken), "measured/ideal": median / ideal}
        if name in block.ours:
            entry |= {"simulated": block.simulated[name], "measured/simulated": median / block.simulated[name]}
        found["contestants"][name] = entry
    medians = {name: entry["median"] for name, entry in found["contestants"].items()}
    found["pairs"] = {kind: {"torch": theirs, "torch/ours": medians[theirs] / medians[kind]}
                      for kind, theirs in SAME.items() if kind in medians and theirs in medians}
    if block.ours and block.torch:
        ours, theirs = min(block.ours, key=medians.__getitem__), min(block.torch, key=medians.__getitem__)
        found["best"] = {"ours": ours, "torch": theirs, "torch/ours": medians[theirs] / medians[ours]}
        if block.bound is not None:
            found["best"] |= {"bound_seconds": block.bound, "torch/bound": medians[theirs] / block.bound,
                              "ours/bound": medians[ours] / block.bound}
    return found


def verdicts(block: Block, found: dict[str, Any], smallest: bool) -> dict[str, bool]:
    """The bars, by what they ask."""
    checks = {f"{kind} is faster in ours, {block.name}": pair["torch/ours"] > 1 for kind, pair in found["pairs"].items()}
    if smallest:
        checks |= {f"{name} takes at most {SLOWER_THAN_SIMULATED} of the simulated time, {block.name}":
                   found["contestants"][name]["measured/simulated"] <= SLOWER_THAN_SIMULATED for name in block.ours}
    if "best" in found:
        faster = found["best"]["torch/ours"] >= FASTER_THAN_TORCH
        checks[f"our best is {FASTER_THAN_TORCH} times as fast as torch's, {block.name}"] = faster
    return checks


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
