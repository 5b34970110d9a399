"""Point-to-point links of one pipeline line: activations downstream, gradients upstream.

Receives are posted ahead, sends never block; what is still in flight is kept alive here until it has left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from actors.comm.groups import Group, wait
from orchestrator.schedule.ir.actions import Payload, Transfer

Key = tuple[Payload, int, int]


class Links:
    """One step's transfers of one rank. `shape_of(slot, microbatch)`: shape of the activation, or None where it is empty."""

    def __init__(self, group: Group, dtype: torch.dtype, device: torch.device,
                 shape_of: Callable[[int, int], tuple[int, ...] | None]):
        self._group, self._dtype, self._device, self._shape_of = group, dtype, device, shape_of
        self._posted: dict[Key, tuple[object, torch.Tensor]] = {}
        self._sent: list[tuple[object, torch.Tensor]] = []
        self.bytes_sent = 0

    def post(self, transfer: Transfer) -> None:
        """Post the receive that `take` waits for. Empty microbatches send nothing."""
        shape = self._shape_of(transfer.slot, transfer.microbatch)
        if shape is not None:
            tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
            work = self._group.receive(tensor, transfer.peer, transfer.tag)
            self._posted[transfer.payload, transfer.slot, transfer.microbatch] = (work, tensor)

    def take(self, payload: Payload, slot: int, microbatch: int) -> torch.Tensor | None:
        """Wait for a posted receive and give its tensor; None for an empty microbatch.

        Raises Aborted; KeyError: the program never posted this receive.
        """
        if self._shape_of(slot, microbatch) is None:
            return None
        work, tensor = self._posted.pop((payload, slot, microbatch))
        wait(work)
        return tensor

    def send(self, transfer: Transfer, tensor: torch.Tensor | None) -> None:
        """Start to send. Raises Aborted; ValueError: a microbatch with sequences has nothing to send."""
        shape = self._shape_of(transfer.slot, transfer.microbatch)
        if shape is None:
            return
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{transfer}: a tensor of shape {shape} was to be sent")
        tensor = tensor.contiguous()
        self._sent.append((self._group.send(tensor, transfer.peer, transfer.tag), tensor))
        self.bytes_sent += tensor.numel() * tensor.element_size()

    def drain(self) -> None:
        """Wait until every send has left. Raises Aborted."""
        for work, _ in self._sent:
            wait(work)
        self._sent.clear()
