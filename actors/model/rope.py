"""Rotary position embedding, plain and YaRN: one complex factor per position and pair of dimensions.

Pairs are interleaved, (x0, x1), (x2, x3), ..., and stay in place. Tables are computed in FP64, then rounded to FP32
(not when computing in float64).
Source: DeepSeek-V3 report, section 4.3; correction range and mscale as in the released code (inference/model.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actors.model.weights import exact_dtype
from orchestrator.config.run_config import ModelConfig


class Rotary:
    """Tables of one model, kept by (length, device, dtype)."""

    def __init__(self, model: ModelConfig):
        self._model = model
        self._tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def table(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """complex64 (complex128 when `dtype` is float64) [length, qk_rope_head_dim / 2], for activations of `dtype`."""
        key = (length, device, dtype)
        if key not in self._tables:
            angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(self._model))
            size = torch.full_like(angles, _table_magnitude(self._model))
            kind = torch.complex128 if exact_dtype(dtype) == torch.float64 else torch.complex64
            self._tables[key] = torch.polar(size, angles).to(device, kind)
        return self._tables[key]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of x [..., d] by the factors of `table` (complex, broadcast against [..., d/2]). A new tensor."""
    exact = x.to(table.real.dtype).contiguous()
    pairs = torch.view_as_complex(exact.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).view(x.shape).to(x.dtype)


def softmax_scale(model: ModelConfig) -> float:
    """Factor on q.k: one over the root of the head size, times mscale squared with YaRN."""
    scale, yarn = model.qk_head_dim**-0.5, model.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def frequencies(model: ModelConfig) -> Tensor:
    """float64 [qk_rope_head_dim / 2]: radians per position of every pair."""
    dim, base, yarn = model.qk_rope_head_dim, model.rope_theta, model.rope_scaling
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return plain / yarn.factor * stretched + plain * (1 - stretched)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _table_magnitude(model: ModelConfig) -> float:
    yarn = model.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)
