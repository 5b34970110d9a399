"""Sizes and work of a layout in closed form: parameters, bytes a rank needs, floating-point operations a token."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import ModelConfig, RunConfig
from orchestrator.layout import Layout
from orchestrator.ownership import Bucket
from orchestrator.parameters import moe_layers, mtp_layer, stage_layers, stage_parameters

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: working weights, gradients, owned master weights with moments, activations at their peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def parameter_count(model: ModelConfig) -> tuple[int, int]:
    """(all, used by one token), multi-token prediction included in the first only (as the published 671B and 37B)."""
    layers = range(model.num_hidden_layers)
    specs = stage_parameters(model, layers, first=True, last=True)
    main = [spec for spec in specs if spec.layer != mtp_layer(model)]
    idle_share = 1 - model.num_experts_per_tok / model.n_routed_experts
    idle = sum(spec.size for spec in main if spec.expert is not None) * idle_share
    return sum(spec.size for spec in specs), round(sum(spec.size for spec in main) - idle)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs a token, causal attention counted once: 6 x active matrix weights (embedding look-up left out) plus
    attention products. For DeepSeek-V3 at 4096 tokens this gives the published 250 GFLOP (Insights, Table 2)."""
    active = parameter_count(model)[1] - model.vocab_size * model.hidden_size
    per_layer = sequence_length * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    return 6 * active + 3 * model.num_hidden_layers * per_layer


def memory(config: RunConfig, layout: Layout, buckets: tuple[Bucket, ...], rank: int, in_flight: int) -> Memory:
    """Estimate for `rank` with `in_flight` microbatches whose activations are kept. Buffers of communication not counted."""
    width = BYTES[config.training.dtype]
    exact = max(4, width)
    held = [b for b in buckets if rank in b.holders]
    weights = sum(b.shard_size * len(b.owners) * (exact if b.precise else width) for b in held)
    gradients = sum(b.shard_size * len(b.owners) * exact for b in buckets if rank in b.members)
    optimizer = sum(3 * b.shard_size * exact * len(b.shards_of(rank)) for b in buckets)
    return Memory(weights, gradients, optimizer, in_flight * _microbatch_bytes(config, layout, rank))


def _microbatch_bytes(config: RunConfig, layout: Layout, rank: int) -> int:
    """Kept activations of one microbatch in the heavier of the rank's stages."""
    model, training = config.model, config.training
    tokens = training.microbatch_sequences * config.data.sequence_length
    per_stage = stage_layers(model, layout.pipeline, config.layout.layers_per_stage)
    heaviest = 0
    for stage in layout.stages(layout.places[rank].position):
        last = stage == layout.pipeline - 1
        moe = moe_layers(model, per_stage[stage], last=last)
        dense = [n for n in per_stage[stage] if not model.is_moe(n)]
        values = len(moe) * _layer_values(model, training.recompute, True) + len(dense) * _layer_values(model, training.recompute, False)
        if last:
            values += (1 + model.num_nextn_predict_layers) * (2 * model.hidden_size + model.vocab_size)
        heaviest = max(heaviest, values)
    return tokens * heaviest * BYTES[training.dtype]


def _layer_values(model: ModelConfig, recompute: str, moe: bool) -> int:
    """Values kept a token in one layer, by what backward needs: segment inputs always; the rest unless recomputed."""
    h, heads = model.hidden_size, model.num_attention_heads
    copies = model.num_experts_per_tok if moe else 0
    inner = copies * model.moe_intermediate_size if moe else model.intermediate_size
    if moe:
        inner += model.n_shared_experts * model.moe_intermediate_size
    inputs = 3 * h + copies * h  # layer input, residual, MLP input, dispatched rows
    if recompute == "full":
        return inputs
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    kept = inputs + latents + heads * model.v_head_dim + 2 * inner  # attention output, gate and up projections
    if recompute == "selective":
        return kept
    return kept + h + latents + 2 * heads * model.qk_head_dim + heads * model.v_head_dim + inner
