"""One rank of the overlap bench: a process inside a node's namespace that runs our programs and torch's schedule, in turn."""

from __future__ import annotations

import datetime
import gc
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from actors.comm.exchange import ExpertExchange, TwoHops
from actors.comm.groups import Generation, wait
from actors.comm.links import Links
from actors.model.weights import WeightGradients
from actors.runtime.exchange_lane import ExchangeLane, InTurn
from actors.runtime.executor import Executor, StepWork
from actors.runtime.process_setup import settle
from jobs.benches.overlap.figures import Shares, shares
from jobs.benches.overlap.held import LaneRecord, LayeredChunk, Seconds, Tape, Tokens
from jobs.benches.overlap.torch_peer import BlockingExchange, TorchDualPipeV
from jobs.benches.shared.held_lane import HeldLane, exact_sleep, sleep_until
from jobs.benches.shared.networks import enter
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.schedule.ir.actions import ActionKind, Program, Work
from orchestrator.schedule.ir.spans import Span
from orchestrator.schedule.ir.stages import Stages

_TIMEOUT_SECONDS = 60.0
_AHEAD_SECONDS = 0.005
_FIRST = -20  # the highest priority that setpriority(2) knows
_PORT = 29400  # of a namespace that nobody else uses


@dataclass(frozen=True)
class OverlapTask:
    """A program of one position. layers: of a stage. communicates: with dispatch and combine; overlap: under compute."""

    stages: Stages
    microbatches: int
    program: Program
    layers: int
    communicates: bool = True
    overlap: bool = True


@dataclass(frozen=True)
class Torch:
    """ScheduleDualPipeV with `layers` in each of a rank's two stages."""

    microbatches: int
    layers: int


@dataclass(frozen=True)
class OverlapStep:
    """What one rank did: seconds on the common clock when it was done; how late it began; what its lanes did.

    complete: it held its lane and communicated exactly as its schedule says. exchanges: how many; order: a digest of their names
    in order, the same on all ranks of an EP group.
    """

    end: float
    late: float
    complete: bool
    exchanges: int
    order: int
    shares: Shares
    spans: list[Span]


def overlap_rank(config: RunConfig, namespace: str, address: str) -> OverlapRank:
    """What a process hosts. It goes before other work of the machine: a held lane hardly computes, but must wake in time."""
    enter(namespace)
    os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
    return OverlapRank(address)


class OverlapRank:
    """Answers calls one at a time. `open` comes first."""

    def __init__(self, address: str):
        exact_sleep()
        settle()
        self._address, self._lane, self._journal = address, HeldLane(), LaneRecord()
        self._contestants: dict[str, _OverlapProgram | TorchDualPipeV] = {}
        self._exchanges: tuple[Tokens, BlockingExchange] | None = None

    def open(self, rank: int, layout: Layout, meeting: str) -> None:
        """Connect with the other ranks: groups of ours, and torch's own. meeting: the address of rank 0."""
        self._place, self._layout = layout.places[rank], layout
        os.environ["GLOO_SOCKET_IFNAME"] = f"eth{self._place.local}"
        timeout = datetime.timedelta(seconds=_TIMEOUT_SECONDS)
        store = dist.TCPStore(meeting, _PORT, layout.size, is_master=rank == 0, timeout=timeout)
        self._generation = Generation(0, rank, torch.device("cpu"), self._address, _TIMEOUT_SECONDS)
        lines = [layout.line(row, w) for row in range(layout.rows) for w in range(layout.width)]
        experts = [layout.expert_group(0, position) for position in range(layout.pipeline)]
        rails = [layout.rail(0, position, w) for position in range(layout.pipeline) for w in range(layout.width)]
        inside = [layout.inside(row, position) for row in range(layout.rows) for position in range(layout.pipeline)]
        self._generation.create(dist.PrefixStore("ours", store), [*lines, *experts, *rails, *inside], experts)
        self._line = self._generation.group(layout.line(self._place.row, self._place.width))
        self._experts = self._generation.group(layout.expert_group(0, self._place.position))
        dist.init_process_group("gloo", store=dist.PrefixStore("torch", store), rank=rank, world_size=layout.size,
                                timeout=timeout)
        theirs = {ranks: dist.new_group(list(ranks)) for ranks in dict.fromkeys([*lines, *experts])}
        self._their_line, self._their_experts = theirs[self._line.ranks], theirs[self._experts.ranks]

    def abort(self) -> None:
        self._generation.abort()

    # --- what things cost, alone ---------------------------------------------------------------------------------

    def hold_times(self, seconds: float, repeats: int) -> list[float]:
        self._lane.reset(1.0)
        return list(_timed(lambda: self._lane.hold("F", 0, seconds, lambda: None), repeats))

    def exchange_times(self, count: int, hidden: int, repeats: int) -> list[dict[str, float]]:
        """Seconds of each exchange of a layer, one after the other and nothing else meanwhile; in our way.

        Counts have travelled ahead of the dispatch, as they do wherever another exchange is before it on the lane.
        """
        tokens, _ = self._exchange(count, hidden)
        found = []
        for _ in range(repeats):
            announced = tokens.announce()
            sleep_until(time.perf_counter() + _AHEAD_SECONDS)
            stamps = [time.perf_counter()]
            rows, handle = tokens.dispatch(tokens.entering(0), announced, 0)
            stamps.append(time.perf_counter())
            hidden_th = tokens.combine(rows, handle, 0)
            stamps.append(time.perf_counter())
            rows = tokens.combine_backward(hidden_th, handle, 1)
            stamps.append(time.perf_counter())
            tokens.dispatch_backward(rows, handle, 1)
            stamps.append(time.perf_counter())
            names = ("dispatch", "combine", "combine_backward", "dispatch_backward")
            found.append({name: end - start for name, (start, end) in zip(names, pairwise(stamps), strict=True)})
        return found

    def blocking_times(self, count: int, hidden: int, repeats: int) -> list[float]:
        """The same of torch's `all_to_all_single`."""
        return list(_timed(self._exchange(count, hidden)[1].run, repeats))

    def ping_pong(self, count: int, hidden: int, pause: float, repeats: int) -> list[tuple[float, float]]:
        """Of the first two positions of every line: (sent at, 0) and (0, received at), in the order of the messages.

        pause: before each message, as a stage holds its lane between receiving and sending, so that the receiver is asleep.
        """
        me = self._line.rank
        if me > 1:
            return []
        stamps, tensor = [], torch.zeros(count, hidden)
        for index in range(repeats):
            if index % 2 == me:
                sleep_until(time.perf_counter() + pause)
                stamps.append((time.perf_counter(), 0.0))
                wait(self._line.send(tensor, 1 - me, index))
            else:
                wait(self._line.receive(tensor, 1 - me, index))
                stamps.append((0.0, time.perf_counter()))
        return stamps

    # --- steps ---------------------------------------------------------------------------------------------------

    def prepare(self, tasks: dict[str, OverlapTask | Torch], count: int, hidden: int, seconds: Seconds) -> None:
        """Make the contestants of the steps to come, by name."""
        self._close_contestants()
        tokens, blocking = self._exchange(count, hidden)
        rank, lane, journal = self._place.rank, self._lane, self._journal
        self._tasks = tasks
        self._contestants = {
            name: _OverlapProgram(rank, self._place.position, task, lane, journal, tokens, self._line, seconds)
            if isinstance(task, OverlapTask)
            else TorchDualPipeV(rank, lane, blocking, journal, seconds, self._their_line, task.layers, task.microbatches,
                                count * hidden)
            for name, task in tasks.items()}
        gc.collect()
        gc.freeze()  # what lives as long as the bench is not looked at again

    def ready(self, name: str, factor: float) -> None:
        """The step that `go` runs: of contestant `name`, durations multiplied by `factor`."""
        self._next, self._task = self._contestants[name], self._tasks[name]
        self._lane.reset(factor)
        self._journal.holds.clear()
        self._journal.exchanges.clear()
        self._next.prepare()
        gc.collect()

    def go(self, start: float, traced: bool) -> OverlapStep:
        """Run it from `start` on, the same for all ranks."""
        late = max(0.0, time.perf_counter() - start)
        sleep_until(start)
        self._next.run()
        end = time.perf_counter()
        spans, journal = self._next.spans(), self._journal
        actions = self._task.program.actions if isinstance(self._task, OverlapTask) else ()
        return OverlapStep(end, late, self._complete(), len(journal.exchanges), zlib.crc32(repr(journal.exchanges).encode()),
                           shares(spans, actions, start, end), spans if traced else [])

    def close(self) -> None:
        self._close_contestants()
        self._generation.close()

    def _close_contestants(self) -> None:
        for contestant in self._contestants.values():
            if isinstance(contestant, _OverlapProgram):
                contestant.close()
        self._contestants = {}

    def _complete(self) -> bool:
        holds, exchanges, task = self._journal.holds, self._journal.exchanges, self._task
        if isinstance(task, Torch):
            each = 2 * 2 * task.microbatches * task.layers
            return len(holds) == 3 * each and len(exchanges) == 2 * each
        at, wanted, sent = {}, Counter(), 0
        for index, action in enumerate(task.program.actions):
            for compute in action.computes if isinstance(action, Work) else ():
                parts = "IW" if compute.kind is ActionKind.BACKWARD else str(compute.kind)
                sent += 2 * task.layers * (parts != "W") * task.communicates
                for part in parts:
                    at[part, compute.slot, compute.microbatch] = index
                    wanted |= {(part, compute.slot, compute.microbatch, layer): 2 for layer in range(task.layers)}
        order = [at.get(hold[:3], -1) for hold in holds]
        return Counter(holds) == wanted and len(exchanges) == sent and order == sorted(order)

    def _exchange(self, count: int, hidden: int) -> tuple[Tokens, BlockingExchange]:
        if self._exchanges is None or (self._exchanges[0].count, self._exchanges[0].hidden) != (count, hidden):
            members = self._experts.size
            self._exchanges = (Tokens(self._expert_exchange(), self._experts.rank, members, count, hidden),
                               BlockingExchange(self._their_experts, count, hidden))
        return self._exchanges

    def _expert_exchange(self) -> ExpertExchange:
        """As a rank of a run makes it: in two hops where a node has several ranks of the group."""
        layout, place, groups, members = self._layout, self._place, self._generation, self._experts.size
        two_hops = None
        if layout.two_hops(0, "auto"):
            two_hops = TwoHops(rail=groups.group(layout.rail(0, place.position, place.width)),
                               inside=groups.group(layout.inside(place.row, place.position)))
        return ExpertExchange(self._experts, torch.arange(members), [1] * members, two_hops=two_hops,
                              counts=groups.group(self._experts.ranks, second=True),
                              nodes=tuple(layout.places[rank].node for rank in self._experts.ranks))


class _OverlapProgram:
    def __init__(self, rank: int, position: int, task: OverlapTask, lane: HeldLane, journal: LaneRecord, tokens: Tokens, line: Any,
                 seconds: Seconds):
        stages, queue = task.stages, WeightGradients()
        self._program, self._line, self._tokens = task.program, line, tokens
        chunks = {slot: LayeredChunk(lane, queue, tokens, journal, seconds, slot=slot, layers=task.layers,
                                     entered=stage * task.layers, total=stages.count * task.layers,
                                     communicates=task.communicates)
                  for slot, stage in enumerate(stages.hosted(position))}
        steps = (step for path in stages.paths for step in pairwise(path))
        fed_by = {after: before for (origin, before), (target, after) in steps if origin == target == position}
        self._lane = ExchangeLane() if task.overlap and task.communicates else None
        self._executor = Executor(rank, 0, chunks, queue, fed_by, self._lane or InTurn())
        self._names = [(slot, n) for slot in range(stages.slots) for n in range(task.microbatches // len(stages.paths))]

    def prepare(self) -> None:
        shape = (self._tokens.count, self._tokens.hidden)
        links = Links(self._line, torch.float32, torch.device("cpu"), lambda slot, microbatch: shape)
        tapes = {(slot, n): Tape(1, shape[0], number=n) for slot, n in self._names}
        self._work = StepWork(tapes, links, lambda: None)

    def run(self) -> None:
        self._executor.run(self._program, self._work)

    def spans(self) -> list[Span]:
        return self._work.spans

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()


def _timed(run: Any, repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        yield time.perf_counter() - started
