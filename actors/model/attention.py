"""Multi-head latent attention, causal over the whole packed sequence.

Name suffixes: b sequences, s positions, a heads, d dimensions of a head.
Source: DeepSeek-V3 report, eq. 1-11; names and row order of the weights as in the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.model.float8 import Float8
from actors.model.linear import Scope, linear, linear_forward, rms_norm
from actors.model.rope import Rotary, rotate, softmax_scale
from actors.model.weights import Weight
from orchestrator.config.run_config import ModelConfig


class Attention:
    """The attention of layer `n`; holds views of its weights only."""

    def __init__(self, model: ModelConfig, n: int, weights: Mapping[str, Weight], rotary: Rotary, in8: Float8 | None = None):
        self._model, self._rotary, self._scale = model, rotary, softmax_scale(model)
        found = {name: weights.get(f"model.layers.{n}.self_attn.{name}.weight") for name in (
            "q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")}
        self._q_down, self._q_norm = found["q_a_proj"], found["q_a_layernorm"]
        self._q_up = found["q_proj"] if model.q_lora_rank is None else found["q_b_proj"]
        self._kv_down, self._kv_norm, self._kv_up = (found[k] for k in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
        self._out = found["o_proj"]
        self._in8, self._out_in8 = in8, in8 and in8.with_powers_of_two()

    def __call__(self, x: Tensor, scope: Scope) -> Tensor:
        """x [b, s, h], already normed, to [b, s, h]."""
        table = self._rotary.table(x.shape[1], x.device, x.dtype)
        q = self._queries(x, table, scope)
        k, v = self._keys_values(x, table, scope)
        out_basd = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale)
        out = out_basd[..., : self._model.v_head_dim].transpose(1, 2)
        return linear(out.reshape(*x.shape[:2], -1), self._out, scope, self._out_in8)

    def _queries(self, x: Tensor, table: Tensor, scope: Scope) -> Tensor:
        model, up, in8 = self._model, self._q_up, self._in8
        latent = x if self._q_down is None else rms_norm(
            linear(x, self._q_down, scope, in8), self._q_norm, model.rms_norm_eps, scope)
        sizes = (model.num_attention_heads, model.qk_nope_head_dim)
        q = _Queries.apply(linear(latent, up, scope, in8), table, *sizes)
        scope.recomputable((q,), lambda latent: _queries(linear_forward(latent, up, in8), table, *sizes), latent)
        return q

    def _keys_values(self, x: Tensor, table: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        model, up, in8 = self._model, self._kv_up, self._in8
        latent, k_rope = linear(x, self._kv_down, scope, in8).split([model.kv_lora_rank, model.qk_rope_head_dim], dim=-1)
        latent = rms_norm(latent, self._kv_norm, model.rms_norm_eps, scope)
        sizes = (model.num_attention_heads, model.qk_nope_head_dim, model.v_head_dim)
        k, v = _KeysValues.apply(linear(latent, up, scope, in8), k_rope, table, *sizes)
        scope.recomputable((k, v), lambda latent, k_rope: _keys_values(linear_forward(latent, up, in8), k_rope, table, *sizes),
                           latent, k_rope)
        return k, v


def _queries(up: Tensor, table: Tensor, heads: int, nope: int) -> Tensor:
    """[b, s, a*(nope+rope)] to [b, a, s, nope+rope] with the last `rope` dimensions rotated."""
    up_bsad = up.view(*up.shape[:2], heads, -1)
    rotated = rotate(up_bsad[..., nope:], table.unsqueeze(1))
    return torch.cat([up_bsad[..., :nope], rotated], dim=-1).transpose(1, 2)


class _Queries(torch.autograd.Function):
    """Linear in its input, so it saves nothing: backward turns the other way."""

    @staticmethod
    def forward(ctx, up: Tensor, table: Tensor, heads: int, nope: int) -> Tensor:
        ctx.table, ctx.nope = table, nope
        return _queries(up, table, heads, nope)

    @staticmethod
    def backward(ctx, gradient_basd: Tensor) -> tuple[Tensor | None, ...]:
        # |factor| may differ from 1 (YaRN's magnitude), so the adjoint is the conjugate, not the inverse
        gradient = gradient_basd.transpose(1, 2)
        turned = rotate(gradient[..., ctx.nope :], ctx.table.conj().unsqueeze(1))
        return torch.cat([gradient[..., : ctx.nope], turned], dim=-1).flatten(2), None, None, None


def _keys_values(up: Tensor, k_rope: Tensor, table: Tensor, heads: int, nope: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """kv [b, s, a*(nope+v)] and the shared key [b, s, rope] to k [b, a, s, nope+rope] and v [b, a, s, v or padded].

    The CPU's fused attention wants values as wide as keys: zeros make them so.
    """
    up_bsad = up.view(*up.shape[:2], heads, nope + v_dim)
    width = nope + k_rope.shape[-1]
    k = up.new_empty(*up_bsad.shape[:3], width)
    k[..., :nope] = up_bsad[..., :nope]
    k[..., nope:] = rotate(k_rope, table).unsqueeze(2)
    padding = max(width - v_dim, 0) if up.device.type == "cpu" else 0
    v = F.pad(up_bsad[..., nope:], (0, padding)) if padding else up_bsad[..., nope:].contiguous()
    return k.transpose(1, 2), v.transpose(1, 2)


class _KeysValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, up: Tensor, k_rope: Tensor, table: Tensor, heads: int, nope: int, v_dim: int) -> tuple[Tensor, Tensor]:
        ctx.table, ctx.nope, ctx.v_dim = table, nope, v_dim
        return _keys_values(up, k_rope, table, heads, nope, v_dim)

    @staticmethod
    def backward(ctx, gradient_k: Tensor, gradient_v: Tensor) -> tuple[Tensor | None, ...]:
        gradient_k, gradient_v = gradient_k.transpose(1, 2), gradient_v.transpose(1, 2)
        up = torch.cat([gradient_k[..., : ctx.nope], gradient_v[..., : ctx.v_dim]], dim=-1).flatten(2)
        k_rope = rotate(gradient_k[..., ctx.nope :].sum(2), ctx.table.conj())
        return up, k_rope, None, None, None, None
