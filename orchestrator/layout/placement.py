"""Expert -> rank. An expert group stays on one node, so the model's group limit is the cluster's node limit.

A placement is a value: computed without measurements, or from measured load; two of them differ by a list of moves. Routing
never reads it, so results do not depend on it beyond the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from orchestrator.config.run_config import ModelConfig
from orchestrator.layout.balance import Ranks, balanced, in_order, nearest, unevenness
from orchestrator.layout.layout import Layout
from orchestrator.model.parameters import moe_layers, stage_layers

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """Experts of one layer in one EP group. `ranks`: of the group; `experts`: of each of them, ascending, in slot order."""

    replica: int
    position: int
    layer: int
    ranks: tuple[int, ...]
    experts: Ranks


@dataclass(frozen=True)
class Placement:
    """Where the experts of every layer are: for each (replica, position, layer that the position hosts) an entry."""

    placed: tuple[LayerExperts, ...]

    def at(self, replica: int, position: int, layer: int) -> Ranks:
        """Experts by index in the EP group. Raises KeyError: the position does not host the layer, or it has no experts."""
        return self._by_place[replica, position, layer].experts

    @cached_property
    def _by_place(self) -> dict[tuple[int, int, int], LayerExperts]:
        return {(entry.replica, entry.position, entry.layer): entry for entry in self.placed}

    @cached_property
    def holders(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(layer, expert) -> ranks that hold it, ascending: one in each replica, two with mirrors."""
        found: dict[tuple[int, int], list[int]] = {}
        for entry in self.placed:
            for rank, experts in zip(entry.ranks, entry.experts):
                for expert in experts:
                    found.setdefault((entry.layer, expert), []).append(rank)
        return {key: tuple(sorted(ranks)) for key, ranks in found.items()}


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """An expert that other ranks hold than before."""

    layer: int
    expert: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def arrives_at(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.after if rank not in self.before)

    @property
    def leaves(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.before if rank not in self.after)


def place_experts(model: ModelConfig, layout: Layout, replica: int, position: int, parts: int = 1) -> Ranks:
    """Expert ids of each rank of an EP group, by index in the group, in slot order; without measurements.

    Group g goes to row floor(g * S / n_group) of the replica's S rows. A position and its mirror hold the same experts: in
    the later half the rows trade their groups, so that the two copies of an expert are on different nodes (see `_apart`).
    Inside a row the experts of its groups are cut into `width` contiguous near-equal runs.
    With `parts` above 1, where the groups do not divide by the rows: as `balance.balanced` has them under the same load.
    """
    return _traded(evenly_placed(model, len(layout.replicas[replica]), layout.width, parts), layout, replica, position)


def evenly_placed(model: ModelConfig, rows: int, width: int, parts: int = 1) -> Ranks:
    """Experts of the ranks of an EP group that no mirror concerns, under the same load on all of them; as `place_experts`."""
    if parts > 1 and model.n_group % rows:
        return balanced([1.0] * model.n_routed_experts, model.n_group, rows, width, parts)
    return in_order(model.n_routed_experts, model.n_group, rows, width)


def default_placement(model: ModelConfig, layout: Layout, layers_per_stage: list[int] | str = "auto",
                      parts: int = 1) -> Placement:
    """Every layer as `place_experts` has it, in order of replica, position, slot."""
    per_stage = stage_layers(model, layout.folding.count, layers_per_stage)
    found = []
    for replica, position in product(range(len(layout.replicas)), range(layout.pipeline)):
        ranks, experts = layout.expert_group(replica, position), place_experts(model, layout, replica, position, parts)
        for stage in layout.stages(position):
            layers = moe_layers(model, per_stage[stage], last=stage == layout.folding.count - 1)
            found += [LayerExperts(replica, position, layer, ranks, experts) for layer in layers]
    return Placement(tuple(found))


def balanced_placement(model: ModelConfig, layout: Layout, current: Placement, load: Mapping[int, Sequence[float]], *,
                       least_gain: float = 0.0, parts: int = 1) -> Placement:
    """The placement for a measured load, each layer by itself, as near to `current` as its balance allows.

    Args:
        current: a placement of this layout.
        load: by layer, of each expert: how many tokens chose it, or a mean of that over steps. A layer without one stays.
        least_gain: a layer stays unless its unevenness (busiest rank divided by the mean) falls by more than this.
        parts: as in `balance.balanced`.
    Raises ValueError: as `balance.balanced`, or `current` is of another layout.
    """
    found: dict[tuple[int, int, int], Ranks] = {}
    for entry in current.placed:
        if entry.ranks != layout.expert_group(entry.replica, entry.position):
            raise ValueError(f"position {entry.position} of replica {entry.replica} was on ranks {entry.ranks}")
        if entry.position <= layout.mirror(entry.position):
            experts = entry.experts
            if any(measured := load.get(entry.layer, ())):
                experts = balanced(measured, model.n_group, len(layout.replicas[entry.replica]), layout.width, parts)
                gain = unevenness(measured, entry.experts) - unevenness(measured, experts)
                stays = gain <= max(least_gain, _ROUNDING)
                experts = entry.experts if stays else nearest(entry.experts, experts, layout.width)
            found[entry.replica, entry.position, entry.layer] = experts
    return Placement(tuple(replace(entry, experts=_traded(
        found[entry.replica, min(entry.position, layout.mirror(entry.position)), entry.layer],
        layout, entry.replica, entry.position)) for entry in current.placed))


def worst_unevenness(placement: Placement, load: Mapping[int, Sequence[float]]) -> float:
    """Busiest rank's load of a layer divided by the mean, in the worst layer of all that have a load."""
    return max((unevenness(load[entry.layer], entry.experts) for entry in placement.placed if entry.layer in load), default=1.0)


def moves(old: Placement, new: Placement) -> list[ExpertMove]:
    """What changes between two placements of one layout, by layer and expert."""
    after = new.holders
    return [ExpertMove(layer, expert, before, after[layer, expert]) for (layer, expert), before in sorted(old.holders.items())
            if after[layer, expert] != before]


def _traded(experts: Ranks, layout: Layout, replica: int, position: int) -> Ranks:
    """Experts by index in the EP group, as the earlier of a position and its mirror has them -> as this position has them."""
    if position <= layout.mirror(position):
        return experts
    to = _apart(layout.nodes_of(replica, layout.mirror(position)), layout.nodes_of(replica, position))
    source = {target: row for row, target in enumerate(to)}
    return tuple(experts[source[row] * layout.width + w] for row in range(len(to)) for w in range(layout.width))


def _apart(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """A permutation `to` with first[row] != second[to[row]] for as many rows as can be.

    That is all of them, unless one node has more than half of the places in `first` and `second` together (Hall's theorem);
    ownership then finds an owner elsewhere.
    Each row takes the nearest that it can, itself before the next: nobody moves where mirrors never share a node, and
    everybody moves to the next row where a row has one node of its own. Augmenting paths settle the rest.
    """
    rows = len(first)
    source: dict[int, int] = {}

    def settle(row: int, tried: set[int]) -> bool:
        for target in ((row + step) % rows for step in range(rows)):
            if first[row] != second[target] and target not in tried:
                tried.add(target)
                if target not in source or settle(source[target], tried):
                    source[target] = row
                    return True
        return False

    stuck = [row for row in range(rows) if not settle(row, set())]
    free = [target for target in range(rows) if target not in source]
    to = {row: target for target, row in source.items()} | dict(zip(stuck, free))
    return [to[row] for row in range(rows)]
