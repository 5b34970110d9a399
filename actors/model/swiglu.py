"""silu(gate) * up: the same arithmetic with and without autograd, for those who keep its input and those who round it.

`gate_up` is [n, 2i], the gate's columns first; `row_weight` [n].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_of(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_swiglu_of(gate_up: Tensor, row_weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).mul_(row_weight.unsqueeze(-1))


def swiglu_backward(gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, silu(gate)) for the gradient of silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated, out = F.silu(gate), torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    out_gate, out_up = out.chunk(2, dim=-1)
    torch.ops.aten.silu_backward(gradient * up, gate, grad_input=out_gate)
    torch.mul(gradient, activated, out=out_up)
    return out, activated


class SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_of(gate_up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gate_up, gradient)[0]


class WeightedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, row_weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, row_weight)
        return weighted_swiglu_of(gate_up, row_weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, row_weight = ctx.saved_tensors
        out, activated = swiglu_backward(gate_up, gradient * row_weight.unsqueeze(-1).to(gradient.dtype))
        up = gate_up.chunk(2, dim=-1)[1]
        return out, torch.linalg.vecdot((activated * up).to(row_weight.dtype), gradient.to(row_weight.dtype))
