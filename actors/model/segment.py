"""Segments: a stage's forward or backward of one microbatch, cut wherever communication begins or ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from orchestrator.schedule.ir.spans import Lane

__all__ = ["Lane", "Segment", "crossed"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Runs once, on lane COMPUTE or EXCHANGE, which may be different threads. `layer` is -1 outside of layers.

    An exchange runs after all segments before it in its list. Compute runs after all compute before it, and after the exchanges
    that stand at least `after` places before it: with 1 that is all of them.
    """

    lane: Lane
    name: str
    layer: int
    run: Callable[[], None]
    after: int = 1


def crossed(*tensors: torch.Tensor | None) -> None:
    """Say, before using them, that these tensors may come from another lane: on a GPU each lane has a stream of its own, and
    memory must not be used again before the last stream that reads it is done."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
