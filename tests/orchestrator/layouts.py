"""Models, clusters and layouts that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from orchestrator.config.run_config import LayoutSection, ModelConfig, load
from orchestrator.layout.layout import Layout, choose
from orchestrator.schedule.ir.stages import BOTH, Stages
from orchestrator.topology import Node

DEEPSEEK_CONFIG = load(str(Path(__file__).parents[2] / "jobs" / "configs" / "deepseek_v3.yaml"))
DEEPSEEK = DEEPSEEK_CONFIG.model


def small_model(**changes) -> ModelConfig:
    """Four layers, 8 experts in 4 groups; sizes that are no multiples of each other."""
    sizes = {"vocab_size": 53, "hidden_size": 6, "num_hidden_layers": 4, "intermediate_size": 10, "moe_intermediate_size": 5,
             "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "num_attention_heads": 3,
             "q_lora_rank": 7, "kv_lora_rank": 4, "qk_nope_head_dim": 5, "qk_rope_head_dim": 2, "v_head_dim": 3}
    return ModelConfig(**{**sizes, **changes})


def nodes(*ranks: int) -> tuple[Node, ...]:
    return tuple(Node(f"n{index}", count) for index, count in enumerate(ranks))


def layout_of(ranks: tuple[int, ...], pipeline: int, model: ModelConfig, folding: Stages | None = None, **pins) -> Layout:
    """Stages as DualPipe has them, or as told. Raises ConfigError."""
    return choose(nodes(*ranks), LayoutSection(pipeline=pipeline, **pins), model, folding or Stages(BOTH, pipeline))


def clusters(pipeline: int, *, even: bool = False):
    """Ranks of each node, enough for one pipeline."""
    each = st.integers(1, 8).flatmap(lambda n: st.integers(1, 4).map(lambda k: (k,) * n))
    uneven = st.lists(st.integers(1, 4), min_size=1, max_size=8).map(tuple)
    return (each if even else each | uneven).filter(lambda ranks: sum(ranks) >= pipeline)
