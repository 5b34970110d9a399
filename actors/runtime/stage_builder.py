"""What a rank is made of in one generation: its process groups, the exchanges of its EP group, its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from actors.comm.exchange import ExpertExchange, TwoHops
from actors.comm.groups import Generation
from actors.comm.traffic import Traffic
from actors.model.chunk import Chunk
from actors.model.float8 import in8_of
from actors.model.weights import DTYPES, Weight, WeightGradients
from actors.state.optimizer import Optimizer
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.balance import Ranks
from orchestrator.layout.layout import Layout, Place
from orchestrator.layout.placement import Placement
from orchestrator.model.parameters import moe_layers, stage_layers
from orchestrator.state.ownership import Bucket

GroupRanks = tuple[int, ...]


def groups_of(layout: Layout, buckets: Sequence[Bucket], hops: int | str) -> tuple[list[GroupRanks], list[GroupRanks]]:
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


class StageBuilder:
    """Makes the chunks of one rank, for one placement after the other.

    biases: of the gate of every layer with experts. queue, traffic: what all chunks use. blocks: FP8 weights by name.
    """

    def __init__(self, config: RunConfig, layout: Layout, place: Place, generation: Generation, device: torch.device,
                 biases: Mapping[int, Tensor], queue: WeightGradients, traffic: Traffic, blocks: dict[str, Any]):
        self._config, self._layout, self._place, self._generation = config, layout, place, generation
        self._device, self._biases, self._queue, self._traffic = device, biases, queue, traffic
        self._in8 = in8_of(config.precision, blocks, device)

    def chunks(self, weights: Mapping[str, Weight], placement: Placement) -> dict[int, Chunk]:
        """By slot. Layers that are placed alike share an exchange."""
        config, layout, place = self._config, self._layout, self._place
        per_stage = stage_layers(config.model, layout.folding.count, config.layout.layers_per_stage)
        made: dict[Ranks, ExpertExchange] = {}
        chunks = {}
        for slot, stage in enumerate(layout.stages(place.position)):
            layers, last = per_stage[stage], stage == layout.folding.count - 1
            placed = {layer: placement.at(place.replica, place.position, layer)
                      for layer in moe_layers(config.model, layers, last=last)}
            for experts in placed.values():
                if experts not in made:
                    made[experts] = self._exchange(experts)
            chunks[slot] = Chunk(
                config.model, layers=layers, first=stage == 0, last=last, weights=weights, biases=self._biases,
                exchanges={layer: made[experts] for layer, experts in placed.items()},
                local_experts={layer: list(experts[place.expert_rank]) for layer, experts in placed.items()},
                queue=self._queue, recompute=config.training.recompute, dtype=DTYPES[config.training.dtype],
                in8=self._in8)
        return chunks

    def _exchange(self, placed: Ranks) -> ExpertExchange:
        layout, place, generation, config = self._layout, self._place, self._generation, self._config
        slot_of_expert = torch.empty(config.model.n_routed_experts, dtype=torch.int64, device=self._device)
        for slot, expert in enumerate(e for experts in placed for e in experts):
            slot_of_expert[expert] = slot
        ranks, precision = layout.expert_group(place.replica, place.position), config.training.dispatch_precision
        counts, two_hops = generation.group(ranks, second=True), None
        if layout.two_hops(place.replica, config.layout.hops):
            two_hops = TwoHops(rail=generation.group(layout.rail(place.replica, place.position, place.width)),
                               inside=generation.group(layout.inside(place.row, place.position)))
        group = counts if two_hops else generation.group(ranks)
        return ExpertExchange(group if group.size > 1 else None, slot_of_expert, [len(experts) for experts in placed],
                              two_hops=two_hops, counts=counts, nodes=tuple(layout.places[rank].node for rank in ranks),
                              float8_rows=precision == "float8", traffic=self._traffic)
