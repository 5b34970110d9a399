"""FP8 rows: E4M3 values with one FP32 scale for each run of 128 channels of a row, as bytes of one message.

Source: DeepSeek-V3 report, section 3.3; scales of dispatched activations are powers of two.
Name suffixes: n rows, h hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.tiles import E4M3, ROWS, SIDE, Tiled, tiled


def encode(x_nh: Tensor, *, power_of_two: bool) -> Tensor:
    """Rows as bytes: uint8 [n, h + h / 128 * 4], values first, then their scales. h must be a multiple of 128.

    power_of_two: round each scale up to one, so that scaling is exact. Infinite and undefined values come out undefined.
    """
    found = tiled(x_nh, ROWS, power_of_two=power_of_two)
    scale = found.scale.reshape(-1).view(torch.uint8)  # flat first: strides of no rows at all are not those of bytes
    return torch.cat([found.values.view(torch.uint8), scale.view(x_nh.shape[0], x_nh.shape[1] // SIDE * 4)], dim=1)


def decode(message: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `encode`, but for the rounding: [n, hidden] in `dtype`."""
    values, scale = message.split([hidden, hidden // SIDE * 4], dim=1)
    # copies, always: a view as wider numbers must start at a multiple of their size
    scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float32)
    return Tiled(values.contiguous().view(E4M3), scale, ROWS).exact().to(dtype)
