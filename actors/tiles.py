"""FP8 numbers with a scale for each tile, as DeepSeek-V3 trains in them.

Source: DeepSeek-V3 report, section 3.3: E4M3 everywhere; tiles of 1 x 128 for activations and gradients (128 x 1 where products
sum over tokens), blocks of 128 x 128 for weights; a scale is the largest magnitude of its tile / 448, taken from the numbers at
hand. The released kernels round some scales up to powers of two, so that scaling is exact.
A tile of zeros stays zeros. A tile with an infinite or undefined value comes out undefined in that value at least; below the
smallest normal FP32 number a scale stays that number, so what is smaller is rounded to E4M3's subnormals or to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128
ROWS, COLUMNS, BLOCKS = (1, SIDE), (SIDE, 1), (SIDE, SIDE)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WHOLE = (0, 0)
"""One scale for a whole tensor: what is coarser than published, to compare with."""

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Tiled:
    """values FP8 [n, c]; scale FP32 [ceil(n / rows), ceil(c / columns)] of tiles of (rows, columns)."""

    values: Tensor
    scale: Tensor
    tile: tuple[int, int]

    def exact(self) -> Tensor:
        """What the numbers stand for: float32 [n, c]."""
        rows, columns = _sides(self.tile, self.values.shape)
        found = _padded(self.values.float(), rows, columns)
        blocks = found.view(found.shape[0] // rows, rows, found.shape[1] // columns, columns)
        blocks.mul_(self.scale[:, None, :, None])
        return _cropped(found, self.values.shape)


    def t(self) -> Tiled:
        """Of the transposed matrix; tiles turn with it."""
        return Tiled(self.values.t().contiguous(), self.scale.t().contiguous(), (self.tile[1], self.tile[0]))

    def run(self, rows: slice) -> Tiled:
        """Some of the rows, of tiles that are a row high or one for the whole."""
        return Tiled(self.values[rows], self.scale if self.tile == WHOLE else self.scale[rows], self.tile)


def tiled(x_nc: Tensor, tile: tuple[int, int], *, power_of_two: bool = False, form: torch.dtype = E4M3) -> Tiled:
    """Any float [n, c], rounded to FP8; edges are padded with zeros to get their scale."""
    rows, columns = _sides(tile, x_nc.shape)
    padded = _padded(x_nc.float(), rows, columns)
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = scales(blocks.abs().amax((1, 3)) if rows > 1 else blocks.squeeze(1).abs().amax(-1), form, power_of_two)
    values = (blocks / scale[:, None, :, None]).to(form).view(padded.shape)
    return Tiled(_cropped(values, x_nc.shape), scale, tile)


def scales(largest: Tensor, form: torch.dtype, power_of_two: bool) -> Tensor:
    """The scale of tiles whose largest magnitudes are these; FP32, same shape."""
    scale = (largest / torch.finfo(form).max).clamp_(min=_SMALLEST)
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2 ** exponent, 1/2 <= mantissa < 1
    exact = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), exact, scale)


def _sides(tile: tuple[int, int], shape: torch.Size) -> tuple[int, int]:
    return (max(shape[0], 1), max(shape[1], 1)) if tile == WHOLE else tile


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    more = -x.shape[0] % rows, -x.shape[1] % columns
    return F.pad(x, (0, more[1], 0, more[0])) if any(more) else x.contiguous()


def _cropped(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x[: shape[0], : shape[1]].contiguous()
