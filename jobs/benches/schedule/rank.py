"""One rank of the schedule bench: a process that runs our programs and torch's schedules, in turn, on the same held lane."""

from __future__ import annotations

import datetime
import gc
import os
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from actors.comm.groups import Generation, Group, wait
from actors.comm.links import Links
from actors.model.tape import Microbatch
from actors.model.weights import WeightGradients
from actors.runtime.executor import Executor, StepWork
from actors.runtime.process_setup import settle
from jobs.benches.schedule.torch_peer import TorchSchedule
from jobs.benches.shared.held_lane import HeldChunk, HeldLane, entering, exact_sleep, sleep_until
from orchestrator.config.run_config import RunConfig
from orchestrator.schedule.ir.actions import ActionKind, Program, Work
from orchestrator.schedule.ir.spans import Span
from orchestrator.schedule.ir.stages import Stages

_TIMEOUT_SECONDS = 60.0


def schedule_rank(config: RunConfig) -> ScheduleRank:
    """What a process hosts."""
    return ScheduleRank()


@dataclass(frozen=True)
class ScheduleTask:
    """A program of one position of ours."""

    stages: Stages
    microbatches: int
    program: Program


@dataclass(frozen=True)
class HeldStep:
    """What one rank did: seconds on the common clock when it was done; how late it began; what it held, in order, and
    whether that is what its schedule says; sums as in HeldLane."""

    end: float
    late: float
    holds: int
    in_order: bool
    sums: dict[str, float]
    spans: list[Span]


class TimedProgram(Protocol):
    def prepare(self) -> None:
        """What is done before the clock starts."""

    def run(self) -> None:
        """One step."""

    def holds(self) -> list[tuple[str, int]]:
        """How the lane should be held in a step: (kind, stage) in order."""


class ScheduleRank:
    """Answers calls one at a time. `open` comes first."""

    def __init__(self) -> None:
        exact_sleep()
        settle()
        self._lane = HeldLane()
        self._contestants: dict[str, TimedProgram] = {}

    def open(self, rank: int, ranks: int, port: int) -> None:
        """Connect with the other ranks: a group of ours, and torch's default one, both gloo on the loopback."""
        self._rank, self._ranks = rank, ranks
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        timeout = datetime.timedelta(seconds=_TIMEOUT_SECONDS)
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=timeout)
        self._generation = Generation(0, rank, torch.device("cpu"), "127.0.0.1", _TIMEOUT_SECONDS)
        members = tuple(range(ranks))
        self._generation.create(dist.PrefixStore("ours", store), [members])
        self._group = self._generation.group(members)
        dist.init_process_group("gloo", store=dist.PrefixStore("torch", store), rank=rank, world_size=ranks, timeout=timeout)

    def abort(self) -> None:
        self._generation.abort()

    # --- what things cost ----------------------------------------------------------------------------------------

    def hold_overshoot(self, seconds: float, repeats: int) -> list[float]:
        """Seconds by which a hold is too long."""
        self._lane.reset(1.0)
        found = []
        for _ in range(repeats):
            started = time.perf_counter()
            self._lane.hold("F", 0, seconds, lambda: None)
            found.append(time.perf_counter() - started - seconds)
        return found

    def ping_pong(self, way: str, elements: int, pause: float, repeats: int) -> list[tuple[float, float]]:
        """Of ranks 0 and 1: (sent at, 0) and (0, received at) in turn, in the order of the messages.

        way: "ours" or "torch", the same transport under each. pause: before each message, as a stage holds its lane between
        receiving and sending, so that the receiver is asleep.
        """
        if self._rank > 1:
            return []
        stamps, peer, tensor = [], 1 - self._rank, torch.zeros(1, elements)
        for index in range(repeats):
            if index % 2 == self._rank:
                sleep_until(time.perf_counter() + pause)
                stamps.append((time.perf_counter(), 0.0))
                work = self._group.send(tensor, peer, index) if way == "ours" else dist.isend(tensor, peer)
            else:
                work = self._group.receive(tensor, peer, index) if way == "ours" else dist.irecv(tensor, peer)
            wait(work)
            if index % 2 != self._rank:
                stamps.append((0.0, time.perf_counter()))
        return stamps

    def executor_cost(self, task: ScheduleTask, repeats: int) -> list[float]:
        """Seconds an action, of runs of a program whose stages and transfers do nothing."""
        contestant = _HeldProgram(task, self._lane, _Instant(), 1, 0.0)
        self._lane.reset(0.0)
        found = []
        for _ in range(repeats):
            contestant.prepare()
            started = time.perf_counter()
            contestant.run()
            found.append((time.perf_counter() - started) / len(task.program.actions))
        return found

    # --- steps ---------------------------------------------------------------------------------------------------

    def prepare(self, tasks: dict[str, ScheduleTask | int], elements: int, seconds: float) -> None:
        """Make the contestants of the steps to come, by name: our programs, and torch's schedules by microbatches."""
        self._contestants = {
            name: _HeldProgram(task, self._lane, self._group, elements, seconds) if isinstance(task, ScheduleTask)
            else TorchSchedule(name, self._lane, self._rank, self._ranks, task, elements, seconds)
            for name, task in tasks.items()}
        gc.collect()
        gc.freeze()  # what lives as long as the bench is not looked at again

    def ready(self, name: str, factor: float) -> None:
        """The step that `go` runs: of contestant `name`, durations multiplied by `factor`."""
        self._next = self._contestants[name]
        self._lane.reset(factor)
        self._next.prepare()
        gc.collect()

    def go(self, start: float, traced: bool) -> HeldStep:
        """Run it from `start` on, the same for all ranks."""
        late = max(0.0, time.perf_counter() - start)
        sleep_until(start)
        self._next.run()
        end = time.perf_counter()
        spans = self._next.spans() if traced and isinstance(self._next, _HeldProgram) else []
        return HeldStep(end, late, len(self._lane.log), self._lane.log == self._next.holds(), self._lane.sums, spans)


class _HeldProgram:
    def __init__(self, task: ScheduleTask, lane: HeldLane, group: Group, elements: int, seconds: float):
        stages, position, queue = task.stages, task.program.position, WeightGradients()
        self._stages, self._program, self._group, self._elements = stages, task.program, group, elements
        chunks = {slot: HeldChunk(lane, queue, stage, stages.count, seconds / stages.chunks)
                  for slot, stage in enumerate(stages.hosted(position))}
        self._executor = Executor(position, 0, chunks, queue, stages.handovers(position))
        self._names = [(slot, n) for slot in range(stages.slots) for n in range(task.microbatches // len(stages.paths))]
        self._entering = {n: entering(n, elements) for _, n in self._names}

    def prepare(self) -> None:
        shape = (1, self._elements)
        links = Links(self._group, torch.float32, torch.device("cpu"), lambda slot, microbatch: shape)
        tapes = {(slot, n): Microbatch(1, self._elements, tokens=self._entering[n]) for slot, n in self._names}
        self._work = StepWork(tapes, links, lambda: None)

    def run(self) -> None:
        self._executor.run(self._program, self._work)

    def spans(self) -> list[Span]:
        return self._work.spans

    def holds(self) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        for action in self._program.actions:
            if isinstance(action, Work):
                for compute in action.computes:
                    parts = "IW" if compute.kind is ActionKind.BACKWARD else str(compute.kind)
                    found += [(held, compute.stage) for held in parts]
        return found


class _Instant:
    """A group whose transfers are done at once; what is received is what the memory held."""

    def send(self, tensor: torch.Tensor, member: int, tag: int) -> _Instant:
        return self

    receive = send

    def wait(self) -> Any:
        return None
