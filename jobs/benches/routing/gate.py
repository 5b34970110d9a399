"""What choosing experts and permuting tokens costs, against `transformers`' gate and `index_select`, in one process."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from actors.comm.exchange import ExpertExchange
from actors.model.gate import choose_experts, expert_weights
from orchestrator.config.run_config import ModelConfig


def peer_is_here() -> bool:
    return importlib.util.find_spec("transformers") is not None


def measure(model: ModelConfig, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat, alternating, and the ratio of the medians; `same`: both chose, weighed and moved alike.

    Ours is the gate, and dispatch on a rank that has all experts; theirs the gate, and rows and weights put in order of expert.
    """
    ours, theirs = _contestants(model, tokens)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    with torch.no_grad():
        same = _same(ours(), theirs())
        for _ in range(repeats):
            for name, run in (("ours", ours), ("transformers", theirs)):
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {"tokens": tokens, "hidden": model.hidden_size, "seconds": seconds, "same": same,
            "microseconds_per_token": {name: median / tokens * 1e6 for name, median in medians.items()},
            "ours/transformers": medians["ours"] / medians["transformers"]}


Run = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _contestants(model: ModelConfig, tokens: int) -> tuple[Run, Run]:
    """Each gives rows [t * k, h], their weights, and how many go to every expert."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    make = torch.Generator().manual_seed(1)
    experts, top_k = model.n_routed_experts, model.num_experts_per_tok
    x_th = torch.randn(tokens, model.hidden_size, generator=make)
    weight_eh = torch.randn(experts, model.hidden_size, generator=make) / model.hidden_size**0.5
    bias_e = 0.02 * torch.randn(experts, generator=make)
    router = DeepseekV3TopkRouter(DeepseekV3Config(
        hidden_size=model.hidden_size, n_routed_experts=experts, n_group=model.n_group, topk_group=model.topk_group,
        num_experts_per_tok=top_k, norm_topk_prob=model.norm_topk_prob, routed_scaling_factor=model.routed_scaling_factor))
    router.weight.data.copy_(weight_eh)
    router.e_score_correction_bias.copy_(bias_e)
    exchange = ExpertExchange(None, torch.arange(experts), [experts])

    def ours() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        affinity_te = torch.nn.functional.linear(x_th, weight_eh).sigmoid()
        choice_tk = choose_experts(affinity_te, bias_e, model)
        sent = exchange.dispatch(x_th, expert_weights(affinity_te, choice_tk, model), choice_tk)
        return sent.rows, sent.weights, torch.tensor(sent.counts)

    def theirs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, weight_tk, choice_tk = router(x_th)
        order = choice_tk.flatten().argsort(stable=True)
        rows = x_th.index_select(0, order // top_k)
        return rows, weight_tk.flatten().index_select(0, order), torch.bincount(choice_tk.flatten(), minlength=experts)

    return ours, theirs


def _same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return (torch.equal(ours[0], theirs[0]) and torch.allclose(ours[1], theirs[1], rtol=1e-5)
            and torch.equal(ours[2], theirs[2]))
