"""One rank's whole runtime: its stages, its optimizer shards, its process groups.

Needs torch.distributed only; a Ray actor or a plain process wraps it. A step is `step` (compute and reduce; nothing
persistent changes) and, once the coordinator has committed it, the `PendingUpdate` that the next call carries.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from actors.calls.messages import (
    Assignment,
    FormationReport,
    Former,
    LossSums,
    PendingUpdate,
    RankState,
    Rearranged,
    Rearrangement,
    Recollection,
    SavedPiece,
    StepReport,
    StepRequest,
)
from actors.comm.groups import Generation, Group
from actors.comm.links import Links
from actors.comm.traffic import Traffic
from actors.comm.waiting import OperationCounter, OutOfStep
from actors.comm.wires import Wires
from actors.model.weights import DTYPES, WeightGradients, exact_dtype, initial_value
from actors.protocol.heartbeat_client import HeartbeatClient
from actors.runtime.authority import Authority
from actors.runtime.exchange_lane import ExchangeLane, lane_for
from actors.runtime.executor import Executor, StepWork
from actors.runtime.meeting import MeetingPlace
from actors.runtime.probe import ProbeListener
from actors.runtime.process_setup import device_name, settle, stay_on_a_core, warm_up
from actors.runtime.stage_builder import StageBuilder, groups_of
from actors.runtime.step_io import digests, links, loss_sums, microbatches, scales
from actors.state.checkpoint import CheckpointError, PieceWriter, restore_shards
from actors.state.generations import Held, State
from actors.state.hugging_face import ModelFolder
from actors.state.optimizer import Optimizer, shards_of
from actors.state.resharding import Carried, carry_over
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.placement import Placement
from orchestrator.protocol.members import Member
from orchestrator.schedule.ir.actions import Program
from orchestrator.schedule.ir.spans import figures
from orchestrator.state import ownership, transfer


class Rank:
    """`host`: the address of this rank's node that its peers can reach. `authority`: whom it obeys."""

    def __init__(self, config: RunConfig, host: str):
        self._host = host
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.configure(config)
        self.authority, self._meeting_place, self._held, self._progress = Authority(), MeetingPlace(), Held(), OperationCounter()
        self._lane: ExchangeLane | None = None
        self._attaching, self._reached = threading.Lock(), None  # the heartbeat client, and who answers probes
        self.optimizer: Optimizer | None = None
        self._writer: PieceWriter | None = None
        if self._device.type == "cpu":
            settle()
            self._cores = sorted(os.sched_getaffinity(0))

    @property
    def biases(self) -> dict[int, torch.Tensor]:
        """Of the gates of this rank's layers, part of its state."""
        return self._held.current.biases

    @property
    def connected(self) -> bool:
        """Whether a coordinator is at the other end of the heartbeat connection; from any thread."""
        reached = self._reached
        return reached is not None and reached[0].connected

    @property
    def _generation(self) -> Generation | None:
        return self.authority.generation

    def configure(self, config: RunConfig) -> None:
        """Another configuration, from the next `form` on."""
        self._config, self._dtype = config, DTYPES[config.training.dtype]
        self._blocks: dict[str, torch.Tensor] = {}

    # --- generations ---------------------------------------------------------------------------------------------

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str, target: str | None = None,
               epoch: int = 0) -> None:
        """Keep a heartbeat connection to the coordinator at `address`, as this member of `run`; safe from any thread. target:
        host:port of this rank's metrics. epoch: of that coordinator; 0: it counts none. Raises Superseded."""
        with self._attaching:
            self.authority.attached(run, epoch)
            warm_up()
            before, listener = self._reached or (None, ProbeListener(self._host))
            if before is not None:
                before.close()
            about = {"target": target, "device": device_name(), "probe": list(listener.address)}
            self._reached = HeartbeatClient(address, member, self.abort, beat_seconds, run=run, epoch=lambda: self.authority.epoch,
                                            finished=lambda: self._progress.count, about=lambda: about), listener

    def form(self, assignment: Assignment) -> FormationReport:
        """Take a place in a new generation: groups, buffers, stages; and state, carried over from `former`. Without, state is
        empty until `initialise` or `restore`.

        Raises Aborted: a member does not come, or goes, or the generation was given up. The state that this rank had is as it was.
        """
        started = time.perf_counter()
        self.authority.check(assignment.generation)
        self.close()
        self.configure(assignment.config)
        former, layout, config = assignment.former, assignment.layout, self._config
        generation = Generation(assignment.generation, assignment.rank, self._device, self._host,
                                config.training.step_timeout_seconds, config.elastic.form_seconds, self._progress)
        self.authority.enter(generation)
        state = self._held.brought_into(assignment)
        published = state is None or self._held.published
        self._assignment, self._layout = assignment, layout
        buckets = self._buckets_of(assignment.placement)
        store = dist.PrefixStore(assignment.prefix, self._meeting_place.at(assignment.store))
        groups, seconds = groups_of(layout, buckets, config.layout.hops)
        everybody = tuple(range(layout.size + len(former.leaving))) if former else groups[0]
        generation.meet(store, len(everybody), assignment.meeting_seconds)
        generation.create(store, [everybody, *groups], seconds)
        grouped = time.perf_counter()
        carried = Carried(0, 0)
        if assignment.rank >= layout.size:
            carried, _ = self._carry_over(former, state, generation.group(everybody), None)
            return FormationReport(grouped - started, time.perf_counter() - grouped, carried.sent, carried.received)
        if self._device.type == "cpu":
            stay_on_a_core(self._cores, layout, assignment.rank)
        self._place = layout.places[assignment.rank]
        self._queue, self._traffic, self._wires = WeightGradients(), Traffic(), Wires()
        self._blocks.clear()
        self._lasting = frozenset(groups_of(layout, (), config.layout.hops)[0])
        self._world = generation.group(groups[0])
        self._stage_group = generation.group(layout.peers(self._place.position))
        shards = shards_of(assignment.rank, buckets, config.optimizer, exact_dtype(self._dtype), self._device,
                           state.shards if state else ())
        new = State(replace(assignment, former=None), buckets, shards, self._biases_of(state), former.applied if former else None)
        fresh: frozenset[int] = frozenset()
        if former is not None:
            carried, fresh = self._carry_over(former, state, generation.group(everybody), new)
        self._held.add(assignment.generation, new)
        self._chunks = self._executor = None  # they hold buffers that are let go of
        self.optimizer = Optimizer(assignment.rank, buckets, config.optimizer, self._dtype, self._device, new.shards,
                                   self.optimizer)
        self._load: dict[int, torch.Tensor] = {}
        self._stages = StageBuilder(config, layout, self._place, generation, self._device, new.biases, self._queue, self._traffic,
                                    self._blocks)
        self._lane = lane_for(self._device) if config.schedule.overlap else None
        self._set_up(assignment.placement)
        self._programs: dict[tuple[bool, int], Program] = {}  # (for training, microbatches)
        if former is not None:
            self._publish(None if former.publish else fresh, whole=former.publish or published)
        return FormationReport(grouped - started, time.perf_counter() - grouped, carried.sent, carried.received)

    def rearrange(self, wanted: Rearrangement) -> Rearranged:
        """Move experts with all their state to where another placement has them, between two steps of which the first was
        applied. Groups stay, and so does what the placement does not change.

        Raises Aborted: the generation is of no use any more, or was given up; the state of the generation before is as it was.
        """
        started, assignment, config, state = time.perf_counter(), self._assignment, self._config, self._settled()
        rank, buckets, published = assignment.rank, self._buckets_of(wanted.placement), self._held.published
        plan = transfer.plan(state.buckets, buckets, range(self._layout.size), [place.node for place in self._layout.places])
        self.authority.renumber(wanted.generation)
        self._regroup(state.buckets, buckets)
        shards = shards_of(rank, buckets, config.optimizer, exact_dtype(self._dtype), self._device, state.shards)
        carried = carry_over(plan, rank, self._world, state.shards, shards, state.biases, state.biases)
        self._assignment = replace(assignment, generation=wanted.generation, placement=wanted.placement)
        self._held.add(wanted.generation, State(replace(self._assignment, former=None), buckets, shards, state.biases, state.applied))
        self._chunks = self._executor = None  # they hold buffers that are let go of
        self.optimizer = Optimizer(rank, buckets, config.optimizer, self._dtype, self._device, shards, self.optimizer)
        self._publish(plan.fresh, whole=published)
        self._set_up(wanted.placement)
        return Rearranged(carried.sent, carried.received, time.perf_counter() - started)

    def finish(self, apply: PendingUpdate | None, base: int) -> RankState:
        """Go back to the state of generation `base`, all others are let go of; there complete a committed step from what this rank
        holds, if it has not done so yet: without the others, whose communication has been aborted. Working weights are then to be
        published. Where this rank has no state of that generation, it has none at all from now on, and says so.
        """
        held, state = self._held, self._held.base(base)
        if apply is not None and state is not None and held.reduced == apply.step == state.applied:
            self._update(apply)
        return RankState(held.generation, state.applied if state is not None else None, held.reduced, held.published)

    def recall(self) -> Recollection:
        """What this rank holds; from any thread."""
        return self._held.recollect()

    def initialise(self) -> None:
        """State of step 0, the same on any layout: random weights, or those of a folder. Raises FolderError."""
        self._loading()
        config, model = self._config, self._config.model
        for bias in self.biases.values():
            bias.zero_()
        if config.training.init_from is None:
            self.optimizer.initialise(lambda spec: initial_value(spec.name, spec.shape, config.run.seed, model.initializer_range))
        else:
            folder = ModelFolder(config.training.init_from)
            self.optimizer.initialise(folder.weight)
            for layer, bias in self.biases.items():
                bias.copy_(folder.bias(layer, model.n_routed_experts))
        self._publish()
        self._held.has_applied(0)

    def restore(self, directory: str, pieces: tuple[SavedPiece, ...], steps: int) -> None:
        """State of a checkpoint, whatever layout wrote it. Raises CheckpointError."""
        state = self._loading()
        restore_shards(directory, pieces, state.shards, state.biases, steps)
        self._publish()
        self._held.has_applied(steps)

    def abort(self, generation: int | None = None) -> None:
        """End every blocked communication of this rank, and refuse what comes later, of generations up to this one; without a
        number, of the present one. Safe from any thread, at any time."""
        self.authority.give_up(generation)

    def close(self) -> None:
        """Leave the generation, with all its sockets and threads."""
        generation = self.authority.leave()
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close(generation.abort)
        if generation is not None:
            generation.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> StepReport:
        """Apply the step committed before, then compute and reduce this one. Raises ActionFailed, Aborted."""
        started = time.perf_counter()
        if request.program is not None:
            self._programs[True, request.microbatches] = request.program
        state = self._settled()
        if request.apply is not None:
            self.apply(request.apply)
        if state.applied != request.step:
            raise OutOfStep(f"step {request.step} on a state after {state.applied} updates")
        self._held.has_reduced(None)
        self._blocks.clear()  # weights have changed
        self.optimizer.zero_gradients()
        sent_before = self._traffic.sent
        tapes = microbatches(request, self._chunks, self._layout, self._config, self._device, keep=True)
        for chunk in self._chunks.values():
            chunk.scales = scales(self._config, request.divisors)
            for load in chunk.load.values():
                load.zero_()
        work, began = StepWork(tapes, self._links(request), self._reduce), time.time()
        with torch.no_grad():  # islands switch gradients on for themselves
            self._executor.run(self._programs[True, request.microbatches], work)
        self._held.has_reduced(request.step)
        ended = time.perf_counter()
        return StepReport(
            rank=self._assignment.rank, step=request.step, losses=loss_sums(tapes), gradient_norm=self.optimizer.gradient_norm,
            digests=digests(tapes, self._chunks), figures=figures(work.spans, started, ended), seconds=ended - started,
            bytes_sent=work.links.bytes_sent, exchanged=self._traffic.sent - sent_before, load=self._reported_load(),
            spans=tuple(work.spans) if request.keep_spans else (), wires=self._wires.since(), began=began)

    def apply(self, apply: PendingUpdate) -> None:
        """Finish a committed step: weights, moments, gate biases. Raises Aborted."""
        self._held.settle()
        self._update(apply)
        self._publish()

    def _update(self, apply: PendingUpdate) -> None:
        """All that changes of the state; without communication, so that it is done whole or not at all.

        Raises OutOfStep: that step is not the one that is due, or its gradients are not here.
        """
        held, state = self._held, self._held.current
        if not apply.step == state.applied == held.reduced:
            raise OutOfStep(f"update of step {apply.step} on a state after {state.applied} updates, with the gradients of "
                            f"{held.reduced}")
        held.has_published(False)
        held.has_applied(None)
        self.optimizer.update(apply.learning_rate)
        speed = self._config.training.bias_update_speed
        for layer, load in self._load.items():
            state.biases[layer] += speed * torch.sign(load.double().mean() - load).to(state.biases[layer])
        held.has_applied(apply.step + 1)

    def _publish(self, only: frozenset[int] | None = None, whole: bool = True) -> None:
        """Working weights from the state: of these buckets, or all. whole: then all are. Raises Aborted."""
        self._held.has_published(False)
        self.optimizer.publish(self._generation, only)
        self._held.has_published(whole)

    def evaluate(self, request: StepRequest) -> LossSums:
        """Loss sums over a batch, forward only; changes nothing."""
        if request.program is not None:
            self._programs[False, request.microbatches] = request.program
        self._blocks.clear()
        tapes = microbatches(request, self._chunks, self._layout, self._config, self._device, keep=False)
        work = StepWork(tapes, self._links(request), lambda: None)
        with torch.no_grad():
            self._executor.run(self._programs[False, request.microbatches], work)
        return loss_sums(tapes)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def snapshot(self, directory: str) -> None:
        """Copy the state that this rank is primary owner of, and begin to write it beside the training."""
        rank, state = self._assignment.rank, self._settled()
        biases = state.biases if rank == self._stage_group.ranks[0] else {}
        self._writer = PieceWriter(directory, rank, state.shards, biases, self._assignment.generation)

    def saved(self, directory: str) -> list[SavedPiece]:
        """Wait, as long as storage takes, for what `snapshot` began there; the bound is the caller's. Raises CheckpointError."""
        writer = self._writer
        if writer is None or writer.directory != directory:
            raise CheckpointError(f"nothing is being written to {directory}")
        self._writer = None
        return writer.finish()

    # --- what a rank is made of ----------------------------------------------------------------------------------

    def _buckets_of(self, placement: Placement) -> tuple[ownership.Bucket, ...]:
        return ownership.buckets_of(self._config, self._layout, placement)

    def _biases_of(self, state: State | None) -> dict[int, torch.Tensor]:
        """Of the gates of all layers that this rank hosts: those of `state`, and zeros where it has none."""
        config, rank, exact = self._config, self._assignment.rank, exact_dtype(self._dtype)
        hosts = ownership.gates(config.model, self._layout, config.layout.layers_per_stage)
        known = state.biases if state else {}
        return {layer: known[layer] if layer in known else torch.zeros(config.model.n_routed_experts, dtype=exact,
                                                                       device=self._device)
                for layer, ranks in hosts.items() if rank in ranks}

    def _carry_over(self, former: Former, state: State | None, everybody: Group, new: State | None) -> tuple[Carried, frozenset[int]]:
        """Fill the new state from what all have, and which new buckets need working weights. Raises Aborted."""
        plan = transfer.plan_between((former.config, former.layout, former.placement),
                                     (self._config, self._layout, self._assignment.placement), former.came_from, former.leaving)
        carried = carry_over(plan, self._assignment.rank, everybody, state.shards if state else [], new.shards if new else [],
                             state.biases if state else {}, new.biases if new else {})
        return carried, plan.fresh

    def _loading(self) -> State:
        """The state, which counts as none until it is whole."""
        state = self._settled()
        self._held.has_applied(None)
        self._held.has_reduced(None)
        return state

    def _settled(self) -> State:
        """The state, where all have arrived in this generation."""
        self._held.settle()
        return self._held.current

    def _regroup(self, former: tuple[ownership.Bucket, ...], buckets: tuple[ownership.Bucket, ...]) -> None:
        """Once all are here, make the groups of buckets that are missing, and drop those that are not needed any more. All ranks
        see the same ones missing, in the same order. Raises Aborted."""
        assignment, generation = self._assignment, self._generation
        store = dist.PrefixStore(f"{assignment.prefix}/{generation.number}", self._meeting_place.at(assignment.store))
        generation.meet(store, self._layout.size, self._config.elastic.form_seconds)
        had, needed = (dict.fromkeys(Optimizer.groups(of)) for of in (former, buckets))
        for ranks in had:
            if ranks not in needed and ranks not in self._lasting and assignment.rank in ranks:
                generation.group(ranks).close()
        generation.create(store, [ranks for ranks in needed if ranks not in had and ranks not in self._lasting])

    def _set_up(self, placement: Placement) -> None:
        """Stages and what runs them, over the optimizer's weights."""
        self._chunks = self._stages.chunks(self.optimizer.weights, placement)
        self._executor = Executor(self._assignment.rank, self._generation.number, self._chunks, self._queue,
                                  self._layout.folding.handovers(self._place.position), self._lane, self._progress)

    def _links(self, request: StepRequest) -> Links:
        line = self._generation.group(self._layout.line(self._place.row, self._place.width))
        return links(request, line, self._config, self._dtype, self._device)

    def _reduce(self) -> None:
        self._load = {layer: load.clone() for chunk in self._chunks.values() for layer, load in sorted(chunk.load.items())}
        if self._load:
            counts = torch.stack([self._load[layer] for layer in sorted(self._load)])
            self._stage_group.all_reduce(counts)
            self._load = dict(zip(sorted(self._load), counts))
        self.optimizer.reduce(self._generation, self._world)

    def _reported_load(self) -> dict[int, list[int]]:
        first = self._assignment.rank == self._stage_group.ranks[0]
        return {layer: load.tolist() for layer, load in self._load.items()} if first else {}
