"""Chunks on plain flat buffers, and how to run them."""

from __future__ import annotations

import torch

from actors.comm.exchange import ExpertExchange
from actors.model.chunk import Chunk, LossScales, Microbatch
from actors.model.weights import Weight, WeightGradients, allocate, exact_dtype, initial_value
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import ParameterSpec, moe_layers, stage_layers, stage_parameters

SCALES = LossScales(next_token=0.01, mtp=0.004, balance=0.02)
SEED = 5


def small_model(**changes) -> ModelConfig:
    sizes = dict(vocab_size=53, hidden_size=32, num_hidden_layers=3, intermediate_size=40, moe_intermediate_size=24,
                 n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, num_attention_heads=3, q_lora_rank=20,
                 kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14, initializer_range=0.15)
    return ModelConfig(**{**sizes, **changes})


def specs_of(model: ModelConfig) -> list[ParameterSpec]:
    return stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)


def weights_of(model: ModelConfig, dtype: torch.dtype, experts: list[int] | None = None) -> dict[str, Weight]:
    """All weights of the model, or those that a rank with only these experts holds, at their initial values."""
    held = [s for s in specs_of(model) if experts is None or s.expert is None or s.expert in experts]
    weights = allocate(held, dtype)
    for spec in held:
        weights[spec.name].value.copy_(initial_value(spec.name, spec.shape, SEED, model.initializer_range))
        if len(spec.shape) == 1:  # ones hide mistakes
            weights[spec.name].value.add_(initial_value(spec.name, (*spec.shape, 1), SEED, 0.2).flatten())
    return weights


def biases_of(model: ModelConfig, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    layers = moe_layers(model, range(model.num_hidden_layers), last=True)
    make = torch.Generator().manual_seed(SEED)
    return {n: 0.1 * torch.randn(model.n_routed_experts, generator=make, dtype=exact_dtype(dtype)) for n in layers}


class Pipeline:
    """The stages of a model on one rank, in one thread."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float64, *, stages: int = 1, recompute: str = "none",
                 group=None, experts_of_rank: list[list[int]] | None = None, in8: dict | None = None):
        placed = experts_of_rank or [list(range(model.n_routed_experts))]
        mine = placed[group.rank if group else 0]
        slots = torch.empty(model.n_routed_experts, dtype=torch.int64)
        slots[[e for experts in placed for e in experts]] = torch.arange(model.n_routed_experts)
        self.exchange = ExpertExchange(group, slots, [len(e) for e in placed])
        self.weights, self.queue = weights_of(model, dtype, mine), WeightGradients()
        self.biases = biases_of(model, dtype)
        self.chunks = [
            Chunk(model, layers=layers, first=s == 0, last=s == stages - 1, weights=self.weights, biases=self.biases,
                  exchanges=dict.fromkeys(self.biases, self.exchange), local_experts=dict.fromkeys(self.biases, mine),
                  queue=self.queue, recompute=recompute, in8=in8)
            for s, layers in enumerate(stage_layers(model, stages))]
        self.scale(SCALES)

    def scale(self, scales: LossScales) -> None:
        for chunk in self.chunks:
            chunk.scales = scales

    def forward(self, tokens, valid=None, keep=True) -> list[Microbatch]:
        """One tape per stage."""
        tapes, hidden = [], None
        for chunk in self.chunks:
            tape = Microbatch(sequences=len(tokens), length=tokens.shape[1] - 1, keep=keep, input=hidden,
                              tokens=tokens if chunk.first or chunk.last else None, valid=valid)
            for segment in chunk.forward(tape):
                segment.run()
            hidden = tape.output
            tapes.append(tape)
        return tapes

    def backward(self, tapes: list[Microbatch], *, flush: bool = True) -> None:
        gradient = None
        for chunk, tape in zip(reversed(self.chunks), reversed(tapes)):
            tape.output_gradient = gradient
            for segment in chunk.backward(tape):
                segment.run()
                if flush:
                    self.queue.flush()
            gradient = tape.input_gradient

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: weight.gradient for name, weight in self.weights.items()}

    def load(self) -> dict[int, torch.Tensor]:
        return {n: load for chunk in self.chunks for n, load in chunk.load.items()}


def losses(tapes: list[Microbatch]) -> list[float]:
    return [float(sum(getattr(t, name) for t in tapes)) for name in ("loss_sum", "mtp_loss_sum", "balance_loss_sum")]


def random_tokens(model: ModelConfig, sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, model.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))


def worst_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference over all tensors, each relative to its tensor's largest value."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-30)) if expected[n].any()
               else float(found[n].abs().max()) for n in expected)
