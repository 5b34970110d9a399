"""What a rank on CPUs asks of the process that it runs in."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

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
