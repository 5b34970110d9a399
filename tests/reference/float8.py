"""FP8 by its definition, in float64 and one number at a time: a slow twin."""

from __future__ import annotations

import math

import numpy as np


def values_of(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> list[float]:
    """Every finite value of a format that is at most `largest`, by magnitude and sign."""
    steps, found = 2**mantissa_bits, {0.0}
    for exponent in range(2**exponent_bits):
        for mantissa in range(steps):
            size = (mantissa / steps) * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / steps) * 2.0 ** (exponent - bias)
            if size <= largest:
                found |= {size, -size}
    return sorted(found)


E4M3 = np.array(values_of(4, 3, 7, 448.0))
E5M2 = np.array(values_of(5, 2, 15, 57344.0))


def rounded(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Nearest values; of two as near, the one at an even place among its sign's, as IEEE has it."""
    above = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    middle = len(grid) // 2  # zero
    even_low = (above - 1 - middle) % 2 == 0
    nearer_low = (x - low < high - x) | ((x - low == high - x) & even_low)
    return np.where(nearer_low, low, high)


def dequantised(x: np.ndarray, rows: int, columns: int, *, grid: np.ndarray = E4M3, power_of_two: bool = False) -> np.ndarray:
    """float32 [n, c] after FP8 with a scale for each tile of (rows, columns), in float64. Scales are FP32, and so are quotients."""
    out = np.zeros(x.shape)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            tile = x[top : top + rows, left : left + columns]
            scale = np.float32(np.abs(tile).max()) / np.float32(grid.max())
            if scale == 0:
                continue
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(float(scale)))
            quotients = (tile.astype(np.float32) / np.float32(scale)).astype(np.float64)
            out[top : top + rows, left : left + columns] = rounded(quotients, grid) * float(scale)
    return out
