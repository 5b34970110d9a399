"""What moves from rank to rank when state changes owners: the difference of two ownerships, as a list of ranges.

Contract: pure. Persistent state is, of every value of a weight, the master weight and two moments, held by the owners of its
range (`Bucket.pieces`); and of every layer with experts the bias of its gate, held by all ranks that host it. The two ownerships
may be of one layout with two placements, or of two layouts: `came_from` says which rank of the old one a rank was. Every rank
that computes the plan from the same values gets the same plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter

from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.state import ownership
from orchestrator.state.ownership import Bucket

STATES = 3
"""Numbers that are kept of a value of a weight: the master weight, and AdamW's two moments."""

Gates = Mapping[int, tuple[int, ...]]
"""Layer -> ranks that keep the bias of its gate."""
Held = tuple[RunConfig, Layout, Placement]
"""What says who owns what."""
Ranges = dict[str, list[tuple[int, int, tuple[int, ...]]]]
"""Weight -> (start, stop, surviving owners by new rank), ascending."""


class StateLost(RuntimeError):
    """No rank that is left owns some state. values: how many of weights, or layers whose gate's bias is gone."""

    def __init__(self, name: str, values: int, unit: str):
        self.name, self.values = name, values
        super().__init__(f"no owner is left of {values} {unit}, the first of them {name}")


@dataclass(frozen=True, slots=True)
class OwnedRange:
    """The flat range [start, stop) of a weight, which a rank owns before and after."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WeightTransfer:
    """The flat range [start, stop) of a weight on its way. source, target: ranks of the new ownership. The range is within one
    shard of the source and within one of the target."""

    name: str
    start: int
    stop: int
    source: int
    target: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class GateTransfer:
    """The bias of a layer's gate on its way. source, target: ranks of the new ownership."""

    layer: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Message:
    """All that goes from one rank to another, in order."""

    weights: list[WeightTransfer] = field(default_factory=list)
    gates: list[GateTransfer] = field(default_factory=list)

    def length(self, gate_values: int) -> int:
        """Numbers in it."""
        return STATES * sum(transfer.size for transfer in self.weights) + gate_values * len(self.gates)


@dataclass(frozen=True)
class TransferPlan:
    """A change of ownership.

    kept: by new rank. fresh: new buckets of which some holder has no working weights yet; the others' are as they were.
    needed: numbers that must travel however the new buckets are cut among their members. gate_values: of one bias.
    number_bytes: of a master weight, a moment, a bias.
    """

    kept: tuple[tuple[OwnedRange, ...], ...]
    weights: tuple[WeightTransfer, ...]
    gates: tuple[GateTransfer, ...]
    fresh: frozenset[int]
    needed: int
    gate_values: int
    number_bytes: int

    @property
    def bytes_moved(self) -> int:
        return self.number_bytes * sum(message.length(self.gate_values) for message in self.messages.values())

    @property
    def bytes_needed(self) -> int:
        """At least, whatever the cuts: a value needs as many owners as it gets, and at best all old ones that are left among the
        members of its bucket stay."""
        return self.number_bytes * self.needed

    @cached_property
    def messages(self) -> dict[tuple[int, int], Message]:
        """(source, target) -> what goes from one to the other; pairs without anything are left out."""
        found: dict[tuple[int, int], Message] = {}
        for transfer in self.weights:
            found.setdefault((transfer.source, transfer.target), Message()).weights.append(transfer)
        for gate in self.gates:
            found.setdefault((gate.source, gate.target), Message()).gates.append(gate)
        return found


def plan(old: Sequence[Bucket], new: Sequence[Bucket], came_from: Sequence[int | None], nodes: Sequence[str], *,
         old_gates: Gates | None = None, new_gates: Gates | None = None, gate_values: int = 0,
         number_bytes: int = 4) -> TransferPlan:
    """What each new owner keeps, and from whom it gets the rest: an old owner that is left, if there is one on the same node,
    and of several the one that sends least so far.

    Args:
        came_from: of every new rank, which rank of the old ownership it was; None: it has nothing. Old ranks that are missing
            here are gone.
        nodes: of every new rank.
        old_gates, new_gates: hosts of layers, as `ownership.gates` has them; gate_values: experts of a layer.
    Raises StateLost; ValueError: a rank came twice, or `nodes` are of other ranks.
    """
    new_rank = {former: rank for rank, former in enumerate(came_from) if former is not None}
    if len(new_rank) != sum(former is not None for former in came_from) or len(nodes) != len(came_from):
        raise ValueError(f"ranks {list(came_from)} on {len(nodes)} nodes' places")
    ranges, sources = _ranges(old, new_rank), _Sources(nodes)
    kept: list[list[OwnedRange]] = [[] for _ in came_from]
    transfers: list[WeightTransfer] = []
    lost: list[OwnedRange] = []
    needed = 0
    for bucket in new:
        members = set(bucket.members)
        for owners, piece in _pieces(bucket):
            for first, last, holding in _overlapping(ranges, piece):
                if not holding:
                    lost.append(OwnedRange(piece.name, first, last))
                    continue
                needed += STATES * (last - first) * max(0, len(owners) - sum(rank in members for rank in holding))
                for owner in owners:
                    if owner in holding:
                        kept[owner].append(OwnedRange(piece.name, first, last))
                    else:
                        source = sources.choose(holding, owner, STATES * (last - first))
                        transfers.append(WeightTransfer(piece.name, first, last, source, owner))
    if lost:
        raise StateLost(lost[0].name, sum(piece.stop - piece.start for piece in lost), "values")
    gates = _gate_transfers(old_gates or {}, new_gates or {}, new_rank, sources, gate_values)
    return TransferPlan(tuple(map(tuple, kept)), tuple(transfers), tuple(gates), _fresh(old, new, came_from),
                        needed + gate_values * len(gates), gate_values, number_bytes)


def plan_between(before: Held, after: Held, came_from: Sequence[int | None], leaving: Sequence[str] = ()) -> TransferPlan:
    """The plan of a run's change. leaving: nodes of ranks that come after those of the layout, and only hand over.

    Raises StateLost.
    """
    (old, old_layout, old_placement), (new, layout, placement) = before, after
    return plan(ownership.buckets_of(old, old_layout, old_placement), ownership.buckets_of(new, layout, placement), came_from,
                [*(place.node for place in layout.places), *leaving],
                old_gates=ownership.gates(old.model, old_layout, old.layout.layers_per_stage),
                new_gates=ownership.gates(new.model, layout, new.layout.layers_per_stage), gate_values=new.model.n_routed_experts)


class _Sources:
    """Who sends how much so far."""

    def __init__(self, nodes: Sequence[str]):
        self._nodes, self._load = nodes, [0] * len(nodes)

    def choose(self, holding: Sequence[int], target: int, numbers: int) -> int:
        near = self._nodes[target]
        source = min(holding, key=lambda rank: (self._nodes[rank] != near, self._load[rank], rank))
        self._load[source] += numbers
        return source


def _ranges(buckets: Sequence[Bucket], new_rank: Mapping[int, int]) -> Ranges:
    found: Ranges = {}
    for bucket in buckets:
        for shard, owners in enumerate(bucket.owners):
            left = tuple(new_rank[rank] for rank in owners if rank in new_rank)
            for spec, start, stop, _ in bucket.pieces(shard):
                found.setdefault(spec.name, []).append((start, stop, left))
    return found


def _pieces(bucket: Bucket) -> Iterator[tuple[tuple[int, ...], OwnedRange]]:
    """Every range of every shard, with its owners."""
    for shard, owners in enumerate(bucket.owners):
        for spec, start, stop, _ in bucket.pieces(shard):
            yield owners, OwnedRange(spec.name, start, stop)


def _overlapping(ranges: Ranges, piece: OwnedRange) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """A piece, cut where old shards border; with who is left of each part's owners."""
    old, at = ranges.get(piece.name, []), piece.start
    for index in range(max(0, bisect_right(old, piece.start, key=itemgetter(0)) - 1), len(old)):
        start, stop, left = old[index]
        if at >= piece.stop or start > at:
            break
        if stop > at:
            last = min(stop, piece.stop)
            yield at, last, left
            at = last
    if at < piece.stop:  # the old ownership did not have it
        yield at, piece.stop, ()


def _gate_transfers(old: Gates, new: Gates, new_rank: Mapping[int, int], sources: _Sources,
                    gate_values: int) -> list[GateTransfer]:
    """Raises StateLost."""
    found, lost = [], []
    for layer, hosts in new.items():
        holding = [new_rank[rank] for rank in old.get(layer, ()) if rank in new_rank]
        if not holding:
            lost.append(layer)
            continue
        found += [GateTransfer(layer, sources.choose(holding, host, gate_values), host)
                  for host in sorted(set(hosts).difference(holding))]
    if lost:
        raise StateLost(f"layer {lost[0]}", len(lost), "biases of gates")
    return found


def _fresh(old: Sequence[Bucket], new: Sequence[Bucket], came_from: Sequence[int | None]) -> frozenset[int]:
    had = {bucket.specs: set(bucket.holders) for bucket in old}
    return frozenset(bucket.index for bucket in new
                     if not had.get(bucket.specs, set()).issuperset(came_from[rank] for rank in bucket.holders))
