"""What a stage keeps of a token, as planned, against the bytes of all tensors that live after a forward."""

from __future__ import annotations

import pytest
import torch

from actors.model.float8 import in8_of
from orchestrator.config.run_config import parse
from orchestrator.plan.activations import bytes_per_token
from tests.actors.model.helpers import Pipeline, random_tokens
from tests.actors.model.test_chunk import LiveBytes

MODEL = {"vocab_size": 300, "hidden_size": 256, "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 512,
         "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
         "num_attention_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
         "v_head_dim": 64}
FLOAT8 = [f"precision.{kind}=fp8" for kind in ("attention", "mlp", "experts", "shared_experts")]


@pytest.mark.parametrize("changes", [[], ["model.num_nextn_predict_layers=0"], ["model.n_shared_experts=0", "model.q_lora_rank=null"]])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", [["training.dtype=bfloat16"], ["training.dtype=bfloat16", *FLOAT8], ["training.dtype=float32"]])
def test_bytes_are_as_planned(precision, recompute, changes):
    config = parse({"model": MODEL}, [*precision, f"training.recompute={recompute}", *changes])
    dtype, blocks = getattr(torch, config.training.dtype), {}
    pipeline = Pipeline(config.model, dtype, recompute=recompute, in8=in8_of(config.precision, blocks))
    tokens = random_tokens(config.model, 4, 64)
    pipeline.forward(tokens, keep=False)  # tables, and weights in FP8 of all experts that are chosen, are made and stay
    with LiveBytes() as live:
        tapes = pipeline.forward(tokens)
        kept = live.total()
    planned = bytes_per_token(config, range(config.model.num_hidden_layers), last=True) * 4 * 64
    assert tapes and kept == pytest.approx(planned, rel=0.1), (kept / planned, kept / 256, planned / 256)
