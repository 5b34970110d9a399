"""The present generation, from the coordinator's side: who serves as which rank of which layout, and what they have been taught.

It carries out one change at a time, and whatever goes wrong in it is raised as RankFailed; `base` then still is the generation
whose state all survivors have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from actors.ahead import Ahead
from actors.crew import Crew
from actors.dealing import Dealer
from actors.messages import ANY_GENERATION, Apply, Assignment, Formed, Former, Rearranged, Rearrangement, Recollection, Standing
from actors.ranks import RankFailed, Ranks
from orchestrator import transfer
from orchestrator.config import RunConfig
from orchestrator.layout import Layout
from orchestrator.membership import Member
from orchestrator.placement import Placement, default_placement
from orchestrator.relayout import Relaid
from orchestrator.relayout_experts import relaid_placement
from orchestrator.topology import Node

FORM_TIMEOUT_SECONDS = 180.0
_MARGIN_SECONDS = 30.0


@dataclass(frozen=True)
class Base:
    """A generation whose state its ranks have. members: by rank."""

    generation: int
    config: RunConfig
    layout: Layout
    placement: Placement
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Regrouped:
    """How a change went: seconds of the slowest rank for making groups, and for moving state; bytes moved over all ranks."""

    grouping_seconds: float
    moving_seconds: float
    bytes: int


class Formation:
    """`config`, `layout`, `placement`, `generation`: the present ones. `host`: where ranks reach this process. `store`: where
    ranks meet; None: one is made."""

    def __init__(self, config: RunConfig, layout: Layout, ranks: Ranks, host: str, store: dist.TCPStore | None = None):
        self.config, self.layout, self.crew, self.generation = config, layout, Crew(config, ranks, host), 0
        self.placement = _default_placement(config, layout)
        self.dealer = Dealer(config, layout)
        self.base: Base | None = None
        self._host, self._store, self._ahead = host, store, Ahead(config)
        self._known: set[tuple[bool, int]] = set()

    # --- calls ---------------------------------------------------------------------------------------------------

    def call(self, method: str, arguments: Sequence[tuple], timeout_seconds: float | None = None) -> list[Any]:
        """On ranks 0, 1, ..., each with its own arguments. Raises RankFailed: one failed, or somebody is lost meanwhile."""
        timeout = self.config.training.step_timeout_seconds + _MARGIN_SECONDS if timeout_seconds is None else timeout_seconds
        return self.crew.start(method, list(arguments)).results(timeout, self.crew.check)

    def everywhere(self, method: str, *arguments: Any, timeout_seconds: float | None = None) -> list[Any]:
        """On all ranks of the layout, with the same arguments. Raises RankFailed."""
        return self.call(method, [arguments] * self.layout.size, timeout_seconds)

    def teach(self, microbatches: int, *, training: bool) -> None:
        """Ship each position's program the first time a number of microbatches comes up in this generation. Raises RankFailed."""
        if (training, microbatches) not in self._known:
            programs = self._ahead.programs(self.config, self.layout.folding, microbatches, training=training)
            self.call("learn", [(programs[place.position], training) for place in self.layout.places])
            self._known.add((training, microbatches))

    def prepare(self, step: int) -> None:
        """Have the programs that the next loss would call for made beside the training."""
        self._ahead.after_one_loss(self.crew.planned, self.layout, step)

    # --- generations ---------------------------------------------------------------------------------------------

    def open(self, members: Sequence[Member] | None = None) -> None:
        """Take over the processes of the first layout, or `members`, which have all its places. Raises RankFailed."""
        self.crew.open(members or [Member(place.node, place.local) for place in self.layout.places])
        if members:
            self.crew.seat(self.layout)

    def adopt(self, members: Sequence[Member], generation: int, committed: int) -> None:
        """Take over processes that another coordinator has left, and make the base the newest generation of which they have all
        state after `committed` steps, be it that some have yet to complete the last of them. generation: a number that was used
        already.

        Raises RankFailed.
        """
        crew = self.crew
        crew.adopt(members)
        crew.abort(ANY_GENERATION)
        found: dict[int, dict[int, tuple[Member, Assignment]]] = {}
        for member, recalled in zip(crew.seated, self._recalled()):
            newest = recalled.held[-1][0].generation if recalled.held else None
            for place, applied in recalled.held:
                generation = max(generation, place.generation)
                pending = place.generation == newest and applied == recalled.reduced == committed - 1
                if applied == committed or pending:
                    found.setdefault(place.generation, {})[place.rank] = member, place
        self.generation = generation
        for number, places in sorted(found.items(), reverse=True):
            known = next(iter(places.values()))[1]
            if _all_state((known.config, known.layout, known.placement), places):
                self.config, self.layout, self.placement = known.config, known.layout, known.placement
                self.base = Base(number, known.config, known.layout, known.placement, tuple(
                    places[rank][0] if rank in places else _nobody(rank) for rank in range(known.layout.size)))
                return

    def form(self) -> Regrouped:
        """The first generation, or one that takes nothing over: its state must be loaded, then `loaded`. Raises RankFailed."""
        self.base = None
        return self._form([None] * self.layout.size, FORM_TIMEOUT_SECONDS)

    def loaded(self) -> None:
        """All ranks have the state of this generation."""
        self.base = Base(self.generation, self.config, self.layout, self.placement, self.crew.seated)

    def seat_survivors(self) -> None:
        """Those of the base that live, whatever they are to be: for `finish`."""
        self.crew.use([member for member in self.base.members if self.crew.trusts(member)])

    def finish(self, apply: Apply | None, applied: int) -> list[Standing]:
        """Have everybody seated go back to the base, and complete a committed step there alone. Those who then do not have the
        state after `applied` steps have come without it: they are of the base no more. Raises RankFailed."""
        base, seated = self.base, self.crew.seated
        standings: list[Standing] = self.call("finish", [(apply, base.generation)] * len(seated), FORM_TIMEOUT_SECONDS)
        astray = {member for member, standing in zip(seated, standings)
                  if (standing.generation, standing.applied) != (base.generation, applied)}
        members = (_nobody(rank) if member in astray else member for rank, member in enumerate(base.members))
        self.base = replace(base, members=tuple(members))
        return [standing for member, standing in zip(seated, standings) if member not in astray]

    def take_seats(self, relaid: Relaid, nodes: tuple[Node, ...] | None = None, placement: Placement | None = None) -> None:
        """Go over to another layout, made for `nodes`, though nobody has been told yet. placement: None: one that moves little.

        Raises RankFailed: somebody was lost.
        """
        former = self.base
        self.config, self.layout = relaid.config, relaid.layout
        self.dealer = Dealer(self.config, self.layout)
        self.placement = placement or (_default_placement(self.config, self.layout) if former is None else relaid_placement(
            self.config.model, self.layout, former.layout, former.placement,
            layers_per_stage=self.config.layout.layers_per_stage, parts=self.config.layout.group_parts))
        self.crew.seat(self.layout, nodes)

    def move(self, applied: int, *, publish: bool) -> Regrouped:
        """Form the generation of the seats taken, with the state of the base. applied: updates in that; publish: all working
        weights are to be rebuilt. Those of the base who serve no more hand over what nobody else has.

        Raises RankFailed; StateLost: no survivor has some of it.
        """
        base, seated = self.base, self.crew.seated
        idle = [member for member in base.members if member not in seated and self.crew.trusts(member)]
        leaving: list[Member] = []
        if idle:
            try:
                self._check_state(seated, ())
            except transfer.StateLost:
                leaving = idle
        self._check_state(seated, leaving)
        self.crew.use([*seated, *leaving])
        former = Former(base.generation, base.config, base.layout, base.placement, applied,
                        _came_from([*seated, *leaving], base.members), tuple(member.node for member in leaving), publish)
        elastic = self.config.elastic
        found = self._form([former] * (len(seated) + len(leaving)), FORM_TIMEOUT_SECONDS, elastic.form_seconds)
        self.crew.use(seated)
        self.loaded()
        return found

    def rearrange(self, placement: Placement) -> list[Rearranged]:
        """Another placement on the same layout: a new generation in the same groups. Raises RankFailed."""
        self.generation += 1
        answers = self.everywhere("rearrange", Rearrangement(self.generation, placement))
        self.placement = placement
        self.loaded()
        return answers

    def close(self) -> None:
        self.crew.close()

    # --- inside --------------------------------------------------------------------------------------------------

    def _recalled(self) -> list[Recollection]:
        """What everybody seated holds; who is lost meanwhile is seated no more. Raises RankFailed."""
        crew = self.crew
        while True:
            crew.use([member for member in crew.seated if crew.trusts(member)])
            try:
                return self.call("recall", [()] * len(crew.seated), FORM_TIMEOUT_SECONDS)
            except RankFailed as failed:
                crew.blame(failed)
                if crew.check() is None:
                    raise

    def _form(self, formers: Sequence[Former | None], timeout_seconds: float, form_seconds: float = 60.0) -> Regrouped:
        self.generation += 1
        self._known.clear()
        address, prefix = self._meeting_place()
        answers: list[Formed] = self.call("form", [
            (Assignment(self.generation, rank, self.config, self.layout, self.placement, address, prefix, former, form_seconds),)
            for rank, former in enumerate(formers)], timeout_seconds)
        return Regrouped(max(answer.grouping_seconds for answer in answers), max(answer.moving_seconds for answer in answers),
                         sum(answer.sent for answer in answers))

    def _meeting_place(self) -> tuple[tuple[str, int], str]:
        if self._store is None:
            self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        return (self._host, self._store.port), f"formation-{self._store.add('formations', 1)}"

    def _check_state(self, seated: Sequence[Member], leaving: Sequence[Member]) -> None:
        """Raises StateLost: these do not have all of it."""
        base = self.base
        transfer.plan_between((base.config, base.layout, base.placement), (self.config, self.layout, self.placement),
                              _came_from([*seated, *leaving], base.members), [member.node for member in leaving])


def layout_record(layout: Layout) -> dict[str, Any]:
    """Of the ledger: fields of the layout, and what is told of it besides."""
    return asdict(layout) | {"pipeline": layout.pipeline, "nodes": list(layout.nodes)}


def _default_placement(config: RunConfig, layout: Layout) -> Placement:
    return default_placement(config.model, layout, config.layout.layers_per_stage, config.layout.group_parts)


def _nobody(rank: int) -> Member:
    """In the place of whoever was this rank of the base, and is not there."""
    return Member("", rank)


def _all_state(held: transfer.Held, ranks: Collection[int]) -> bool:
    """Whether these ranks of a layout have all state between them."""
    layout = held[1]
    try:
        transfer.plan_between(held, held, [rank if rank in ranks else None for rank in range(layout.size)])
    except transfer.StateLost:
        return False
    return True


def _came_from(members: Iterable[Member], before: Sequence[Member]) -> tuple[int | None, ...]:
    was = {member: rank for rank, member in enumerate(before)}
    return tuple(was.get(member) for member in members)
