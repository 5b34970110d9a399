"""One rank's whole runtime: its stages, its optimizer shards, its process groups.

Needs torch.distributed only; a Ray actor or a plain process wraps it. A step is `step` (compute and reduce; nothing
persistent changes) and, once the coordinator has committed it, the `Apply` that the next call carries.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Mapping
from itertools import product

import numpy
import torch
import torch.distributed as dist

from actors.checkpoint import PieceWriter, restore_shards
from actors.comm.exchange import ExpertExchange, TwoHops
from actors.comm.groups import CREATE_TIMEOUT_SECONDS, Aborted, Generation
from actors.comm.links import Links
from actors.comm.traffic import Traffic
from actors.comm.wires import Wires
from actors.executor import Executor, StepWork
from actors.host import settle
from actors.lane import ExchangeLane, lane_for
from actors.messages import Apply, Assignment, LossDivisors, LossSums, SavedPiece, StepReport, StepRequest
from actors.model.chunk import Chunk, LossScales, Microbatch
from actors.model.weights import WeightGradients, exact_dtype
from actors.optimizer import Optimizer
from orchestrator import ownership
from orchestrator.config import RunConfig
from orchestrator.layout import Layout
from orchestrator.ledger import combine, sequence_digest
from orchestrator.parameters import moe_layers, stage_layers
from orchestrator.placement import place_experts
from orchestrator.schedule.actions import Program
from orchestrator.schedule.spans import figures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Rank:
    """`host`: the address of this rank's node that its peers can reach."""

    def __init__(self, config: RunConfig, host: str):
        self._host = host
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.configure(config)
        self._generation: Generation | None = None
        self._lane: ExchangeLane | None = None
        self._store: tuple[tuple[str, int], dist.Store] | None = None
        self._abort_lock = threading.Lock()
        if self._device.type == "cpu":
            settle()
            self._cores = sorted(os.sched_getaffinity(0))

    def configure(self, config: RunConfig) -> None:
        """Another configuration, from the next `form` on."""
        self._config, self._dtype = config, DTYPES[config.training.dtype]

    # --- generations ---------------------------------------------------------------------------------------------

    def form(self, assignment: Assignment) -> None:
        """Take a place in a new generation: groups, buffers, stages. State is empty until `initialise` or `restore`.

        Raises Aborted when a member does not come.
        """
        self.close()
        layout, config = assignment.layout, self._config
        self._stay_on_a_core(layout, assignment.rank)
        self._assignment, self._layout, self._place = assignment, layout, layout.places[assignment.rank]
        self._queue = WeightGradients()
        self._buckets = ownership.buckets(config.model, layout, config.elastic.copies, config.layout.layers_per_stage)
        generation = Generation(assignment.generation, assignment.rank, self._device, self._host,
                                config.training.step_timeout_seconds)
        self._generation = generation
        store = dist.PrefixStore(assignment.prefix, self._meeting_place(assignment.store))
        generation.create(store, *_groups(layout, self._buckets, config.layout.hops))
        self._world = generation.group(tuple(range(layout.size)))
        self._stage_group = generation.group(layout.peers(self._place.position))
        self.optimizer = Optimizer(assignment.rank, self._buckets, config.optimizer, self._dtype, self._device)
        self._traffic, self._wires = Traffic(), Wires()
        self._chunks = self._build_chunks()
        self._lane = lane_for(self._device) if config.schedule.overlap else None
        self._executor = Executor(assignment.rank, assignment.generation, self._chunks, self._queue,
                                  layout.handovers(self._place.position), self._lane)
        self._programs: dict[tuple[bool, int], Program] = {}

    def learn(self, program: Program, training: bool) -> None:
        """Keep a program of this rank's position for steps with its number of microbatches."""
        self._programs[training, program.microbatches] = program

    def initialise(self) -> None:
        """State of step 0, the same on any layout."""
        self.optimizer.initialise(self._config.run.seed, self._config.model.initializer_range)
        self.optimizer.publish(self._generation)

    def restore(self, directory: str, pieces: tuple[SavedPiece, ...], steps: int) -> None:
        """State of a checkpoint, whatever layout wrote it. Raises CheckpointError."""
        restore_shards(directory, pieces, self.optimizer.shards, self.biases, steps)
        self.optimizer.publish(self._generation)

    def abort(self) -> None:
        """End every blocked communication of this rank; safe from any thread, at any time."""
        with self._abort_lock:
            if self._generation is not None:
                self._generation.abort()

    def close(self) -> None:
        """Leave the generation, with all its sockets and threads."""
        with self._abort_lock:
            generation, self._generation = self._generation, None
            lane, self._lane = self._lane, None
        if lane is not None:
            lane.close(generation.abort)
        if generation is not None:
            generation.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> StepReport:
        """Apply the step committed before, then compute and reduce this one. Raises ActionFailed, Aborted."""
        started = time.perf_counter()
        if request.apply is not None:
            self.apply(request.apply)
        self.optimizer.zero_gradients()
        sent_before = self._traffic.sent
        tapes = self._tapes(request, keep=True)
        for chunk in self._chunks.values():
            chunk.scales = self._scales(request.divisors)
            for load in chunk.load.values():
                load.zero_()
        work = StepWork(tapes, self._links(request.sizes), self._reduce)
        with torch.no_grad():  # islands switch gradients on for themselves
            self._executor.run(self._programs[True, request.microbatches], work)
        ended = time.perf_counter()
        return StepReport(
            rank=self._assignment.rank, step=request.step, losses=_sums(tapes), gradient_norm=self.optimizer.gradient_norm,
            digest=self._digest(tapes), figures=figures(work.spans, started, ended), seconds=ended - started,
            bytes_sent=work.links.bytes_sent, exchanged=self._traffic.sent - sent_before, load=self._reported_load(),
            spans=tuple(work.spans) if request.keep_spans else (), wires=self._wires.since())

    def apply(self, apply: Apply) -> None:
        """Finish a committed step: weights, moments, gate biases. Raises Aborted."""
        self.optimizer.apply(self._generation, apply.learning_rate)
        speed = self._config.training.bias_update_speed
        for layer, load in self._load.items():
            self.biases[layer] += speed * torch.sign(load.double().mean() - load).to(self.biases[layer])

    def evaluate(self, request: StepRequest) -> LossSums:
        """Loss sums over a batch, forward only; changes nothing."""
        tapes = self._tapes(request, keep=False)
        work = StepWork(tapes, self._links(request.sizes), lambda: None)
        with torch.no_grad():
            self._executor.run(self._programs[False, request.microbatches], work)
        return _sums(tapes)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def snapshot(self, directory: str) -> None:
        """Copy the state that this rank is primary owner of, and begin to write it beside the training."""
        rank = self._assignment.rank
        biases = self.biases if rank == self._stage_group.ranks[0] else {}
        self._writer = PieceWriter(directory, rank, self.optimizer.shards, biases)

    def saved(self) -> list[SavedPiece]:
        """Wait, as long as storage takes, for the writing that `snapshot` began; the bound is the caller's.

        Raises CheckpointError.
        """
        return self._writer.finish()

    def _meeting_place(self, address: tuple[str, int]) -> dist.Store:
        """The store at `address`, connected to once: torch looks up the names of both ends, and DNS may take seconds.

        Raises Aborted: nobody is there.
        """
        host, port = address
        try:
            if self._store is None or self._store[0] != address or not _answers(self._store[1]):
                self._store = address, dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                                     timeout=datetime.timedelta(seconds=CREATE_TIMEOUT_SECONDS))
        except RuntimeError as error:
            raise Aborted(f"no store at {host}:{port}") from error
        return self._store[1]

    # --- what a rank is made of ----------------------------------------------------------------------------------

    def _stay_on_a_core(self, layout: Layout, rank: int) -> None:
        """On CPUs: keep the compute thread, and the threads that it starts, where their caches are. Where ranks outnumber
        cores, moving between cores costs about 5 % of a step.

        Ranks are counted node by node, so they spread over the cores whether all nodes are one host or each is its own.
        """
        if self._device.type == "cpu":
            by_node = sorted(layout.places, key=lambda place: (place.node, place.local))
            turn = next(index for index, place in enumerate(by_node) if place.rank == rank)
            os.sched_setaffinity(0, {self._cores[turn % len(self._cores)]})

    def _build_chunks(self) -> dict[int, Chunk]:
        config, layout, place = self._config, self._layout, self._place
        per_stage = stage_layers(config.model, layout.folding.count, config.layout.layers_per_stage)
        placed = place_experts(config.model, layout, place.replica, place.position)
        slot_of_expert = torch.empty(config.model.n_routed_experts, dtype=torch.int64, device=self._device)
        for slot, expert in enumerate(e for experts in placed for e in experts):
            slot_of_expert[expert] = slot
        exchange = self._exchange_of(slot_of_expert, [len(experts) for experts in placed])
        exact = exact_dtype(self._dtype)
        chunks, self.biases = {}, {}
        for slot, stage in enumerate(layout.stages(place.position)):
            layers, last = per_stage[stage], stage == layout.folding.count - 1
            moe = moe_layers(config.model, layers, last=last)
            for layer in moe:
                self.biases[layer] = torch.zeros(config.model.n_routed_experts, dtype=exact, device=self._device)
            chunks[slot] = Chunk(
                config.model, layers=layers, first=stage == 0, last=last, weights=self.optimizer.weights,
                biases=self.biases, exchanges=dict.fromkeys(moe, exchange),
                local_experts=dict.fromkeys(moe, list(placed[place.expert_rank])), queue=self._queue,
                recompute=config.training.recompute)
        self._load: dict[int, torch.Tensor] = {}
        return chunks

    def _exchange_of(self, slot_of_expert: torch.Tensor, experts_per_rank: list[int]) -> ExpertExchange:
        layout, place, generation, config = self._layout, self._place, self._generation, self._config
        ranks, precision = layout.expert_group(place.replica, place.position), config.training.dispatch_precision
        counts, two_hops = generation.group(ranks, second=True), None
        if layout.two_hops(place.replica, config.layout.hops):
            two_hops = TwoHops(rail=generation.group(layout.rail(place.replica, place.position, place.width)),
                               inside=generation.group(layout.inside(place.row, place.position)))
        group = counts if two_hops else generation.group(ranks)
        return ExpertExchange(group if group.size > 1 else None, slot_of_expert, experts_per_rank, two_hops=two_hops,
                              counts=counts, nodes=tuple(layout.places[rank].node for rank in ranks),
                              float8_rows=precision == "float8", traffic=self._traffic)

    def _tapes(self, request: StepRequest, *, keep: bool) -> dict[tuple[int, int], Microbatch]:
        """A tape for each (slot, microbatch). The slots that one microbatch passes share its tokens."""
        tokens = valid = None
        if request.tokens is not None:
            tokens, valid = (torch.from_numpy(rows).to(self._device, torch.int64) for rows in (request.tokens, request.valid))
        entrances, starts, at = self._layout.folding.entrances, {}, 0
        for (slot, microbatch), count in request.sizes.items():
            if slot in entrances:
                starts[slot, microbatch] = at
                at += count
        tapes = {}
        for (slot, microbatch), count in request.sizes.items():
            start = starts[slot if slot in entrances else entrances[0], microbatch]
            mine = real = None
            if self._chunks[slot].first or self._chunks[slot].last:
                mine, real = tokens[start : start + count], valid[start : start + count]
            tapes[slot, microbatch] = Microbatch(sequences=count, length=self._config.data.sequence_length, tokens=mine,
                                                 valid=real, keep=keep)
        return tapes

    def _links(self, sizes: Mapping[tuple[int, int], int]) -> Links:
        line = self._generation.group(self._layout.line(self._place.row, self._place.width))
        length, width = self._config.data.sequence_length, self._config.model.hidden_size

        def shape_of(slot: int, microbatch: int) -> tuple[int, ...] | None:
            count = sizes[slot, microbatch]
            return (count, length, width) if count else None

        return Links(line, self._dtype, self._device, shape_of)

    def _scales(self, divisors: LossDivisors) -> LossScales:
        training = self._config.training
        return LossScales(next_token=1 / divisors.next_token, mtp=training.mtp_loss_weight / divisors.mtp,
                          balance=training.balance_loss_weight / divisors.sequences)

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

    def _digest(self, tapes: Mapping[tuple[int, int], Microbatch]) -> int:
        """Of the sequences that entered the pipeline here: each is hashed by one rank only, after its backward."""
        entered = [tape.tokens for (slot, _), tape in tapes.items() if self._chunks[slot].first and tape.tokens is not None]
        return combine(sequence_digest(row.tobytes()) for tokens in entered for row in tokens.cpu().numpy().astype(numpy.int32))


def _sums(tapes: Mapping[tuple[int, int], Microbatch]) -> LossSums:
    return sum((LossSums(float(t.loss_sum), float(t.mtp_loss_sum), float(t.balance_loss_sum)) for t in tapes.values()),
               LossSums())


def _groups(layout: Layout, buckets: tuple[ownership.Bucket, ...],
            hops: int | str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Every group of a generation, in the one order in which all ranks create them; and the second ones, for the counts of
    dispatches."""
    lines = [layout.line(row, w) for row in range(layout.rows) for w in range(layout.width)]
    stages = [layout.peers(position) for position in range(layout.pipeline)]
    experts, counts = [], []
    for replica, position in product(range(len(layout.replicas)), range(layout.pipeline)):
        counts.append(layout.expert_group(replica, position))
        if layout.two_hops(replica, hops):
            experts += [layout.rail(replica, position, w) for w in range(layout.width)]
            experts += [layout.inside(row, position) for row in layout.replicas[replica]]
        else:
            experts.append(counts[-1])
    return [tuple(range(layout.size)), *lines, *experts, *stages, *Optimizer.groups(buckets)], counts


def _answers(store: dist.Store) -> bool:
    try:
        return store.num_keys() >= 0
    except RuntimeError:  # its server is gone; another one may have the same address
        return False
