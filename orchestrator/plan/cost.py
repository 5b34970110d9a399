"""Sizes and work of a layout in closed form: parameters, bytes a rank needs, floating-point operations a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.run_config import ModelConfig, RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.model.parameters import mtp_layer, stage_layers, stage_parameters
from orchestrator.plan.activations import BYTES, bytes_per_token
from orchestrator.state.ownership import Bucket


@dataclass(frozen=True)
class Parameters:
    """`main`: the model as published sizes count it (671B). `mtp`: what multi-token prediction adds; it shares embedding and
    head. `active`: of `main`, what one token uses (37B), the embedding included."""

    main: int
    mtp: int
    active: int


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


def parameters(model: ModelConfig) -> Parameters:
    specs = stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)
    main = [spec for spec in specs if spec.layer != mtp_layer(model)]
    routed = sum(spec.size for spec in main if spec.expert is not None)
    total = sum(spec.size for spec in main)
    active = total - routed + routed * model.num_experts_per_tok // model.n_routed_experts
    return Parameters(total, sum(spec.size for spec in specs) - total, active)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs a token, causal attention counted once: 6 x active weights (embedding look-up left out) plus
    attention products; multi-token prediction is not counted. For DeepSeek-V3 at 4096 tokens this gives the published 250
    GFLOP (Insights, arXiv 2505.09343, Table 2)."""
    multiplied = parameters(model).active - model.vocab_size * model.hidden_size
    per_layer = sequence_length * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    return 6 * multiplied + 3 * model.num_hidden_layers * per_layer


PEAK_TERAFLOPS = {"A100": 312, "A800": 312, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "GH200": 989, "H20": 148, "L40S": 362,
                  "B200": 2250, "GB200": 2500}
"""Of dense BF16 products, by what CUDA calls a device (NVIDIA's data sheets; those that give figures with sparsity, halved)."""


def peak_flops(device: str | None) -> float | None:
    """FLOP/s of dense BF16 products on the accelerator that CUDA calls `device`; None: not known. The longest name counts."""
    names = [name for name in PEAK_TERAFLOPS if device and all(word in device.replace("-", " ").split() for word in name.split())]
    return PEAK_TERAFLOPS[max(names, key=len)] * 1e12 if names else None


def utilisation(model: ModelConfig, sequence_length: int, tokens_per_second: float, peaks: Sequence[float | None]) -> float | None:
    """Model FLOPs utilisation: `flops_per_token` x tokens a second / what all ranks' accelerators could do in BF16 (PaLM,
    arXiv 2204.02311, appendix B). peaks: FLOP/s of every rank; None if one of them is not known."""
    if not peaks or None in peaks:
        return None
    return flops_per_token(model, sequence_length) * tokens_per_second / sum(peaks)


def memory(config: RunConfig, layout: Layout, buckets: tuple[Bucket, ...], in_flight: Sequence[int]) -> tuple[Memory, ...]:
    """Estimate for each rank. `in_flight`: by position, the most microbatches whose activations are kept at once, all
    its stages together. Buffers of communication are not counted."""
    width = BYTES[config.training.dtype]
    exact = max(4, width)
    weights, gradients, optimizer = ([0] * layout.size for _ in range(3))
    for bucket in buckets:
        flat = bucket.shard_size * len(bucket.owners)
        for rank in bucket.holders:
            weights[rank] += flat * (exact if bucket.precise else width)
        for rank in bucket.members:
            gradients[rank] += flat * exact
        for rank in (rank for owners in bucket.owners for rank in owners):
            optimizer[rank] += bucket.shard_size * (exact + 2 * (2 if config.optimizer.moments == "bf16" else exact))
    kept = [count * _microbatch_bytes(config, layout, position) for position, count in enumerate(in_flight)]
    return tuple(Memory(weights[place.rank], gradients[place.rank], optimizer[place.rank], kept[place.position])
                 for place in layout.places)


def _microbatch_bytes(config: RunConfig, layout: Layout, position: int) -> int:
    """Kept activations of one microbatch in the heavier of the position's stages."""
    per_stage = stage_layers(config.model, layout.folding.count, config.layout.layers_per_stage)
    tokens = config.training.microbatch_sequences * config.data.sequence_length
    return round(tokens * max(bytes_per_token(config, per_stage[stage], last=stage == layout.folding.count - 1)
                              for stage in layout.stages(position)))
