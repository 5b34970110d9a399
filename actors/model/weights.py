"""Weights and their gradients, without autograd leaves.

A weight is a pair of views into flat buffers that somebody else owns. Its gradient is never autograd's: every operation
puts a closure into a queue that adds the gradient in place. Running the queue right after a backward segment gives a
full backward (B); taking its content away to run it later gives backward for the input (I) and for the weights (W).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from orchestrator.model.parameters import ParameterSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Weight:
    """`value` in the compute dtype, or FP32 where the spec is precise (FP64 when computing in float64).

    `gradient`, same shape, FP32 (FP64 when computing in float64), is only ever added to.
    `rows`: how many each of the matrices has that it is made of.
    """

    __slots__ = ("gradient", "name", "rows", "value")

    def __init__(self, name: str, value: Tensor, gradient: Tensor, rows: tuple[int, ...] = ()):
        self.name, self.value, self.gradient, self.rows = name, value, gradient, rows or (value.shape[0],)


class WeightGradients:
    """A queue of weight-gradient computations, in the order in which backward reached them."""

    __slots__ = ("_queued",)

    def __init__(self) -> None:
        self._queued: list[Callable[[], None]] = []

    def defer(self, accumulate: Callable[[], None]) -> None:
        self._queued.append(accumulate)

    def flush(self) -> None:
        """Run and drop everything queued."""
        for accumulate in self.take():
            accumulate()

    def take(self) -> list[Callable[[], None]]:
        """Remove what is queued; whoever takes it runs it later, in order."""
        taken, self._queued = self._queued, []
        return taken

    def __len__(self) -> int:
        return len(self._queued)


def fused(weights: Mapping[str, Weight], names: Sequence[str]) -> Weight:
    """One matrix [sum of rows, columns] over matrices that stand one after the other in the flat buffers.

    So one GEMM does the work of several. Raises ValueError: they are not adjacent, or differ in columns.
    """
    parts = [weights[name] for name in names]
    value = _joined([part.value for part in parts], names)
    return Weight("+".join(names), value, _joined([part.gradient for part in parts], names), tuple(len(part.value) for part in parts))


def _joined(parts: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    first, columns, end = parts[0], parts[0].shape[1], parts[0].data_ptr()
    for name, part in zip(names, parts):
        if part.shape[1] != columns or not part.is_contiguous():
            raise ValueError(f"{name}: only contiguous matrices of equal width can be joined, this one is {tuple(part.shape)}")
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            raise ValueError(f"{name} does not directly follow its predecessor in the flat buffer: {', '.join(names)}")
        end += part.numel() * part.element_size()
    return first.as_strided((sum(part.shape[0] for part in parts), columns), (columns, 1))


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What must not be rounded to the compute dtype: FP32, or FP64 when computing in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allocate(specs: Iterable[ParameterSpec], dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Weight]:
    """Zero weights in flat buffers, in the order of the specs: one value buffer per dtype, one gradient buffer each."""
    by_dtype: dict[torch.dtype, list[ParameterSpec]] = {}
    for spec in specs:
        by_dtype.setdefault(exact_dtype(dtype) if spec.precise else dtype, []).append(spec)
    found = {}
    for held, members in by_dtype.items():
        total, start = sum(spec.size for spec in members), 0
        values = torch.zeros(total, dtype=held, device=device)
        gradients = torch.zeros(total, dtype=exact_dtype(dtype), device=device)
        for spec in members:
            value, gradient = (flat[start : start + spec.size].view(spec.shape) for flat in (values, gradients))
            found[spec.name] = Weight(spec.name, value, gradient)
            start += spec.size
    return found


def initial_value(name: str, shape: Sequence[int], seed: int, std: float) -> Tensor:
    """float32 value of a weight before the first step: a function of its name and the seed, so of no layout.

    Matrices are normal with standard deviation `std` (DeepSeek-V3 report, section 4.2); norms are ones.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") & (2**63 - 1))
    return torch.randn(math.prod(shape), generator=generator).mul_(std).view(*shape)
