"""Products on a GPU's FP8 units, by torch's scaled matrix product with a scale for each tile.

cuBLAS has it since CUDA 12.9, for Hopper alone; it promotes sums to FP32 itself. What it wants of memory is torch's
(pytorch/pytorch#166752): scales with the outer dimension first, those of blocks filled up to four along the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.tiles import BLOCKS, ROWS, SIDE, Tiled

_HOPPER, _CUDA = (9, 0), (12, 9)
_ROWS, _COLUMNS, _BLOCKS_OF_SUM = 4, 16, 4
"""What numbers of rows, columns and blocks have to be multiples of."""


def available(device: torch.device) -> bool:
    """Whether torch multiplies FP8 with a scale for each tile there."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(F, "scaled_mm"):
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return version >= _CUDA and torch.cuda.get_device_capability(device) == _HOPPER


def product(a: Tiled, b: Tiled, dtype: torch.dtype) -> Tensor:
    """a [m, k] in tiles of 1 x 128, times b [n, k] transposed, in such tiles or in blocks of 128 x 128. [m, n] in float32 or bfloat16.

    Raises ValueError: other tiles.
    """
    if a.tile != ROWS or b.tile not in (ROWS, BLOCKS):
        raise ValueError(f"tiles of {a.tile} and {b.tile}: the units multiply {ROWS} and {ROWS} or {BLOCKS}")
    (m, _), (n, _) = a.values.shape, b.values.shape
    kinds = F.ScalingType
    right, side = (kinds.BlockWise128x128, SIDE) if b.tile == BLOCKS else (kinds.BlockWise1x128, _COLUMNS)
    left_values, right_values = _filled(a.values, _ROWS, SIDE), _filled(b.values, side, SIDE)
    right_scale = F.pad(b.scale, (0, -b.scale.shape[1] % _BLOCKS_OF_SUM)).t() if b.tile == BLOCKS else _by_column(b.scale, side)
    out = F.scaled_mm(left_values, right_values.t(), _by_column(a.scale, _ROWS), kinds.BlockWise1x128, right_scale, right,
                      output_dtype=dtype)
    return out[:m, :n]


def _filled(values: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, to multiples of these."""
    more = -values.shape[0] % rows, -values.shape[1] % columns
    if not any(more):
        return values.contiguous()
    return F.pad(values.contiguous().view(torch.uint8), (0, more[1], 0, more[0])).view(values.dtype)


def _by_column(scale: Tensor, rows: int) -> Tensor:
    """[n, c] filled up to a multiple of `rows`, its columns one after the other in memory."""
    return F.pad(scale, (0, 0, 0, -scale.shape[0] % rows)).t().contiguous().t()
