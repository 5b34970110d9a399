"""From what the state machine orders of a member to what is sent there, and from what comes back to what the machine sees.

The machine names layouts, placements and checkpoints; here are the programs, batches, learning rates, pieces and addresses that go
with them. For one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from actors.calls import messages
from actors.data.batching import Batch, Dealer
from actors.protocol.program_cache import Ahead
from actors.protocol.tables import Tables
from actors.state.checkpoint import Manifest
from actors.telemetry.step_metrics import SHOWN_RANKS
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.plan.recipe import learning_rate
from orchestrator.protocol import commands, events
from orchestrator.protocol.commands import Call, Form
from orchestrator.protocol.events import Answer, Done, LayoutRef, WorkerAssignment
from orchestrator.protocol.members import Member

_KEPT = 8
OF_NONE = (commands.Recall, commands.Finish, commands.Probe, commands.Collect)
"""Requests that belong to no generation: they are served whatever was given up."""
_FIRST_MEETING_SECONDS = 60.0
"""Of ranks without state, as a run begins or a checkpoint is loaded: they may be long in coming."""


@dataclass(frozen=True, slots=True)
class Dressed:
    """What to call on a member, and with what."""

    method: str
    arguments: tuple[Any, ...]


@dataclass
class Grouping:
    """A generation, as it was ordered. prefix: of its keys at the meeting place. known: (training, microbatches) whose programs its
    ranks have, by rank."""

    plan: WorkerAssignment
    prefix: str
    ranks: Mapping[Member, int]
    known: dict[tuple[bool, int], set[int]] = field(default_factory=dict)


class Dresser:
    """config: the run's, as it was given. host: where ranks reach this process; store: where they meet, None: one is made.
    batch(step), held_out(): what is dealt. abouts: what members said of themselves. manifests: of readable checkpoints, by folder.
    shows(step): whether spans are to be kept of the first ranks; of all, where that is traced(step).
    """

    def __init__(self, config: RunConfig, tables: Tables, host: str, store: dist.TCPStore | None, *, batch: Callable[[int], Batch],
                 held_out: Callable[[], Batch], abouts: Mapping[Member, Mapping[str, Any]], manifests: Mapping[str, Manifest],
                 traced: Callable[[int], bool], shows: Callable[[int], bool]):
        self._config, self._tables, self._host, self._store = config, tables, host, store
        self._batch, self._held_out, self._abouts, self._manifests = batch, held_out, abouts, manifests
        self._traced, self._shows = traced, shows
        self._ahead = Ahead(config)
        self._groupings: dict[int, Grouping] = {}
        self._dealers: dict[LayoutRef, Dealer] = {}
        self._dealt: tuple[tuple[int, int, bool], list[messages.StepRequest]] | None = None
        self._dressers: dict[type, Callable[[Call], Dressed]] = {
            commands.Recall: lambda call: Dressed("recall", (call.request.seconds,)),
            commands.Finish: lambda call: Dressed("finish", (self._apply(call.request.apply), call.request.base)),
            commands.Form: self._form,
            commands.Initialise: lambda call: Dressed("initialise", ()),
            commands.Restore: self._restore,
            commands.Step: self._step,
            commands.Apply: lambda call: Dressed("apply", (self._apply(call.request.step),)),
            commands.Rearrange: self._rearrange,
            commands.Evaluate: self._evaluate,
            commands.Snapshot: lambda call: Dressed("snapshot", (call.request.directory,)),
            commands.Collect: lambda call: Dressed("saved", (call.request.directory,)),
            commands.Probe: self._probe,
        }

    def dressed(self, call: Call) -> Dressed:
        """What to send. Raises KeyError: a generation, a batch or a checkpoint that nobody has heard of."""
        return self._dressers[type(call.request)](call)

    # --- what else is known of generations ------------------------------------------------------------------------

    def grouping(self, generation: int) -> Grouping:
        return self._groupings[generation]

    def arrangement(self, generation: int) -> tuple[RunConfig, Layout, Placement]:
        plan, tables = self._groupings[generation].plan, self._tables
        return tables.config(plan.layout), tables.layout(plan.layout), tables.placement(plan.placement)

    def rank(self, generation: int, member: Member) -> int | None:
        """None: the generation is not known any more, or the member has no place in it."""
        grouping = self._groupings.get(generation)
        return None if grouping is None else grouping.ranks.get(member)

    def requests(self, generation: int, step: int, *, training: bool) -> list[messages.StepRequest]:
        """One for each rank, without programs."""
        key = generation, step, training
        if self._dealt is None or self._dealt[0] != key:
            self._dealt = key, self._deal(generation, step, training=training)
        return self._dealt[1]

    def prepare(self, generation: int, step: int) -> None:
        """Have the programs that the next loss would call for made beside the training."""
        plan = self._groupings[generation].plan
        self._ahead.after_one_loss(plan.planned, self._tables.layout(plan.layout), step)

    # --- requests ------------------------------------------------------------------------------------------------

    def _apply(self, step: int | None) -> messages.PendingUpdate | None:
        if step is None:
            return None
        return messages.PendingUpdate(step, learning_rate(self._config.optimizer, step, self._config.training.steps))

    def _form(self, call: Call) -> Dressed:
        request: Form = call.request
        plan, former, tables = request.plan, request.former, self._tables
        grouping = self._groupings.get(call.generation)
        if grouping is None:
            grouping = self._begin(call.generation, Grouping(plan, self._new_prefix(), _ranks(plan)))
        config = tables.config(plan.layout)
        carried = None if former is None else messages.Former(
            former.base.generation, tables.config(former.base.layout), tables.layout(former.base.layout),
            tables.placement(former.base.placement), former.applied, former.came_from, tuple(member.node for member in plan.leaving),
            former.publish)
        seconds = _FIRST_MEETING_SECONDS if former is None else config.elastic.form_seconds
        return Dressed("form", (messages.Assignment(
            call.generation, grouping.ranks[call.member], config, tables.layout(plan.layout), tables.placement(plan.placement),
            self._meeting_place(), grouping.prefix, carried, seconds, call.call.epoch),))

    def _rearrange(self, call: Call) -> Dressed:
        placement = call.request.placement
        if call.generation not in self._groupings:
            before = self._groupings[max(self._groupings)]
            plan = replace(before.plan, placement=placement)
            self._begin(call.generation, Grouping(plan, before.prefix, before.ranks, before.known))
        return Dressed("rearrange", (messages.Rearrangement(call.generation, self._tables.placement(placement)),))

    def _restore(self, call: Call) -> Dressed:
        manifest = self._manifests[call.request.directory]
        return Dressed("restore", (call.request.directory, manifest.pieces, manifest.step))

    def _step(self, call: Call) -> Dressed:
        return self._stepping("step", call, training=True, apply=self._apply(call.request.apply))

    def _evaluate(self, call: Call) -> Dressed:
        return self._stepping("evaluate", call, training=False, apply=None)

    def _stepping(self, method: str, call: Call, *, training: bool, apply: messages.PendingUpdate | None) -> Dressed:
        grouping = self._groupings[call.generation]
        rank = grouping.ranks[call.member]
        request = self.requests(call.generation, call.request.step, training=training)[rank]
        known, program = grouping.known.setdefault((training, request.microbatches), set()), None
        if rank not in known:
            known.add(rank)
            config, layout = self._tables.config(grouping.plan.layout), self._tables.layout(grouping.plan.layout)
            programs = self._ahead.programs(config, layout.folding, request.microbatches, training=training)
            program = programs[layout.places[rank].position]
        return Dressed(method, (replace(request, apply=apply, program=program),))

    def _probe(self, call: Call) -> Dressed:
        found = {peer: self._abouts.get(peer, {}).get("probe") for peer in call.request.peers}
        addresses = {peer: (address[0], address[1]) for peer, address in found.items() if address}
        return Dressed("probe", (addresses, call.request.seconds))

    # --- inside --------------------------------------------------------------------------------------------------

    def _deal(self, generation: int, step: int, *, training: bool) -> list[messages.StepRequest]:
        ref = self._groupings[generation].plan.layout
        if ref not in self._dealers:
            self._dealers[ref] = Dealer(self._tables.config(ref), self._tables.layout(ref))
        batch = self._batch(step) if training else self._held_out()
        traced = training and self._traced(step)
        requests = self._dealers[ref].requests(batch, None, training=training, keep_spans=traced or training and self._shows(step))
        if not traced:  # the page has room for so many
            requests[SHOWN_RANKS:] = [replace(request, keep_spans=False) for request in requests[SHOWN_RANKS:]]
        return requests

    def _begin(self, generation: int, grouping: Grouping) -> Grouping:
        self._groupings[generation] = grouping
        while len(self._groupings) > _KEPT:
            del self._groupings[min(self._groupings)]
        return grouping

    def _meeting_place(self) -> tuple[str, int]:
        if self._store is None:
            self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        return self._host, self._store.port

    def _new_prefix(self) -> str:
        self._meeting_place()
        return f"formation-{self._store.add('formations', 1)}"


class Reading:
    """What the machine sees of answers."""

    def __init__(self, tables: Tables):
        self._tables = tables
        self._readers: dict[type, Callable[[Any], Answer]] = {
            commands.Recall: self._recalled,
            commands.Finish: lambda value: events.Standing(value.generation, value.applied, value.published),
            commands.Form: lambda value: events.Formed(value.sent, value.grouping_seconds, value.moving_seconds),
            commands.Rearrange: lambda value: events.Formed(value.sent, 0.0, value.seconds),
            commands.Probe: lambda value: events.Probed(tuple(value)),
        }

    def answer(self, call: Call, value: Any) -> Answer:
        reader = self._readers.get(type(call.request))
        return Done() if reader is None else reader(value)

    def _recalled(self, found: Any) -> events.Recalled:
        tables = self._tables
        held = tuple(events.Holding(
            assignment.generation, tables.layout_ref(assignment.config, assignment.layout),
            tables.placement_ref(assignment.placement), assignment.rank, applied, assignment.epoch) for assignment, applied in found.held)
        return events.Recalled(held, found.reduced, found.published, found.busy, found.fault, found.forming)


def _ranks(plan: WorkerAssignment) -> dict[Member, int]:
    return {member: rank for rank, member in enumerate((*plan.members, *plan.leaving))}
