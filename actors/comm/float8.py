"""FP8 rows: E4M3 values with one FP32 scale for each run of 128 channels of a row, as bytes of one message.

Source: DeepSeek-V3 report, section 3.3.2 (tiles of 1 x 128, scale = largest magnitude / 448, taken from the rows at hand); the
released kernels (`act_quant`) round the scales of dispatched activations up to powers of two.
Name suffixes: n rows, h hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
LARGEST = 448.0  # the largest finite E4M3 value
_FORMAT = torch.float8_e4m3fn


def encode(x_nh: Tensor, *, power_of_two: bool) -> Tensor:
    """Rows as bytes: uint8 [n, h + h / 128 * 4], values first, then their scales. h must be a multiple of 128.

    power_of_two: round each scale up to one, so that scaling is exact. Infinite and undefined values come out undefined.
    """
    tiles = x_nh.float().unflatten(1, (-1, TILE))
    # the smallest normal number: a tile of zeros has a scale too
    scale = tiles.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2 ** exponent, 1/2 <= mantissa < 1
        exact = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = torch.where(scale.isfinite(), exact, scale)
    values = (tiles / scale).to(_FORMAT).flatten(1)
    return torch.cat([values.view(torch.uint8), scale.squeeze(-1).view(torch.uint8)], dim=1)


def decode(message: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `encode`, but for the rounding: [n, hidden] in `dtype`."""
    values, scale = message.split([hidden, hidden // TILE * 4], dim=1)
    # copies, always: a view as wider numbers must start at a multiple of their size
    scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float32).unsqueeze(-1)
    tiles = values.contiguous().view(_FORMAT).float().unflatten(1, (-1, TILE))
    return tiles.mul_(scale).flatten(1).to(dtype)
