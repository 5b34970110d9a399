"""Who holds a weight, who owns its optimizer state.

Weights that the same ranks hold (and that are treated alike) form a bucket: one flat buffer, one gradient reduction.
A bucket is cut into equal shards, one per holder (ZeRO-1); each shard has a primary owner and up to `copies` further
owners on other nodes, which get the same reduced gradient and apply the same update, so that losing a node loses no state.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from orchestrator.config.precision import PrecisionSection, exact
from orchestrator.config.run_config import ModelConfig, RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement, default_placement
from orchestrator.model.parameters import ParameterSpec, moe_layers, stage_layers, stage_parameters


@dataclass(frozen=True)
class Bucket:
    """Weights that the same ranks hold.

    `members`: holders, then ranks that only own; they all take part in the reduction. `owners[s]`: of shard s, primary first.
    """

    index: int
    holders: tuple[int, ...]
    members: tuple[int, ...]
    specs: tuple[ParameterSpec, ...]
    decay: bool
    precise: bool
    owners: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        return sum(spec.size for spec in self.specs)

    @property
    def shard_size(self) -> int:
        """Elements of one shard; the flat buffer is padded to a whole number of them."""
        return -(-self.size // len(self.owners))

    def shards_of(self, rank: int) -> tuple[int, ...]:
        return tuple(s for s, owners in enumerate(self.owners) if rank in owners)

    def pieces(self, shard: int) -> list[tuple[ParameterSpec, int, int, int]]:
        """(spec, start, stop, offset): the flat range [start, stop) of a weight that stands at `offset` of this shard."""
        first, last, found = shard * self.shard_size, (shard + 1) * self.shard_size, []
        for index in range(bisect_right(self._starts, first) - 1, len(self.specs)):
            spec, at = self.specs[index], self._starts[index]
            if at >= last:
                break
            start, stop = max(first - at, 0), min(last - at, spec.size)
            if start < stop:
                found.append((spec, start, stop, at + start - first))
        return found

    @cached_property
    def _starts(self) -> list[int]:
        """Where each weight begins in the flat buffer."""
        return [0, *accumulate(spec.size for spec in self.specs[:-1])]


def buckets(model: ModelConfig, layout: Layout, copies: int, layers_per_stage: list[int] | str = "auto",
            placement: Placement | None = None, precision: PrecisionSection = PrecisionSection()) -> tuple[Bucket, ...]:
    """All buckets of a layout, in the one order in which every rank reduces them. `placement`: None: the default one."""
    placement = placement or default_placement(model, layout, layers_per_stage)
    grouped: dict[tuple, list[ParameterSpec]] = {}
    for spec, holders in _holders(model, layout, layers_per_stage, placement):
        grouped.setdefault((holders, spec.decay, spec.precise or exact(precision, spec.name)), []).append(spec)
    found = []
    for index, ((holders, decay, precise), specs) in enumerate(grouped.items()):
        members = holders + _extra_owners(layout, holders, copies)
        owners = _owners(layout, holders, members, copies)
        found.append(Bucket(index, holders, members, tuple(specs), decay, precise, owners))
    return tuple(found)


def buckets_of(config: RunConfig, layout: Layout, placement: Placement | None = None) -> tuple[Bucket, ...]:
    """All buckets of a run in a layout."""
    return buckets(config.model, layout, config.elastic.copies, config.layout.layers_per_stage, placement, config.precision)


def gates(model: ModelConfig, layout: Layout, layers_per_stage: list[int] | str = "auto") -> dict[int, tuple[int, ...]]:
    """Ranks that host a layer with experts, and so keep the bias of its gate, by layer."""
    per_stage = stage_layers(model, layout.folding.count, layers_per_stage)
    return {layer: layout.holders(stage) for stage, layers in enumerate(per_stage)
            for layer in moe_layers(model, layers, last=stage == len(per_stage) - 1)}


def _holders(model: ModelConfig, layout: Layout, layers_per_stage: list[int] | str, placement: Placement):
    """(spec, ranks that hold it) for every weight, each once."""
    per_stage = stage_layers(model, layout.folding.count, layers_per_stage)
    stages_of: dict[ParameterSpec, list[int]] = {}  # two of the embedding, with multi-token prediction
    for stage, layers in enumerate(per_stage):
        for spec in stage_parameters(model, layers, first=stage == 0, last=stage == len(per_stage) - 1):
            stages_of.setdefault(spec, []).append(stage)
    hosts = [layout.holders(stage) for stage in range(len(per_stage))]
    for spec, stages in stages_of.items():
        if spec.expert is None:
            yield spec, tuple(sorted({rank for stage in stages for rank in hosts[stage]}))
        else:
            yield spec, placement.holders[spec.layer, spec.expert]


def _extra_owners(layout: Layout, holders: tuple[int, ...], copies: int) -> tuple[int, ...]:
    """Ranks on further nodes, where the holders sit on fewer than 1 + copies nodes: same position first, then the next rows,
    then the same place in the row, so that the extra work spreads over the ranks."""
    nodes = {layout.places[r].node for r in holders}
    home = layout.places[holders[0]]
    extras: list[int] = []
    others = sorted(layout.places, key=lambda p: (
        p.position != home.position, (p.row - home.row) % layout.rows, (p.width - home.width) % layout.width, p.rank))
    for place in others:
        if len(nodes) > copies:
            break
        if place.node not in nodes:
            nodes.add(place.node)
            extras.append(place.rank)
    return tuple(extras)


def _owners(layout: Layout, holders: tuple[int, ...], members: tuple[int, ...], copies: int) -> tuple[tuple[int, ...], ...]:
    """Per shard: its holder, then up to `copies` members on nodes not used yet, those that own least so far."""
    load = dict.fromkeys(members, 0)
    owners = []
    for shard, primary in enumerate(holders):
        chosen, nodes = [primary], {layout.places[primary].node}
        ring = members[shard + 1 :] + members[:shard]
        for candidate in sorted(ring, key=lambda rank: load[rank]):
            if len(chosen) > copies:
                break
            if layout.places[candidate].node not in nodes:
                chosen.append(candidate)
                nodes.add(layout.places[candidate].node)
                load[candidate] += 1
        owners.append(tuple(chosen))
    return tuple(owners)
