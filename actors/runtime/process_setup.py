"""What a rank on CPUs asks of the process that it runs in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache

import torch

from orchestrator.layout.layout import Layout

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT_BYTES = 1 << 30


def settle() -> None:
    """One compute thread, and memory that stays: glibc gives a large freed tensor back to the kernel at once, and the next one
    of its size costs a page fault every 4 KiB. Elsewhere than on glibc memory is as it was."""
    torch.set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def stay_on_a_core(cores: Sequence[int], layout: Layout, rank: int) -> None:
    """Keep the compute thread, and the threads that it starts, where their caches are. Where ranks outnumber cores, moving between
    cores costs about 5 % of a step.

    Ranks are counted node by node, so they spread over the cores whether all nodes are one host or each is its own.
    """
    by_node = sorted(layout.places, key=lambda place: (place.node, place.local))
    turn = next(index for index, place in enumerate(by_node) if place.rank == rank)
    os.sched_setaffinity(0, {cores[turn % len(cores)]})


@cache
def device_name() -> str | None:
    """What CUDA calls this process's accelerator; None: it has none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def warm_up() -> None:
    """Do what torch does only once, seconds of imports, before anybody waits for it: a backward pass, and an optimizer's step."""
    weight = torch.ones(2, 2, requires_grad=True)
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight], fused=True).step()
