"""Dispatch and combine: rows of tokens to the ranks that hold their experts, and back.

One row per (token, chosen expert); the ranks of an EP group send each other as many rows as it takes, none is dropped.
The steps are separate, so they can be run apart: `plan` (local), `agree` (counts, a small message), `pack` (local),
`transfer` (the payload), `unpack` (local). Backward and combine reuse the plan: only the forward dispatch sends counts.
Name suffixes: t tokens, k experts of a token, h hidden; r rows that this rank received, n rows that it sent (t * k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RowGroup(Protocol):
    """What is needed of a process group."""

    size: int
    rank: int

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Rows [n, ...], contiguous, in order of the receiving member; returns those received, in order of the sender."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the rows of this rank's tokens go.

    order_n: int64, position in the flat [t * k] choice of the n-th sent row; rows are sent by expert slot.
    place_n: its inverse. slot_counts: rows for every slot of the EP group [slots].
    """

    tokens: int
    top_k: int
    order_n: Tensor
    place_n: Tensor
    slot_counts: Tensor


@dataclass(frozen=True, slots=True)
class Handle:
    """A plan whose counts all ranks of the group know; good for one dispatch, its combine, and the backward of both.

    sent, received: rows to and from every rank. counts: received rows of every local expert.
    sort_r: received row that comes r-th when sorted by local expert, None where they arrive sorted; unsort_r: its inverse.
    """

    plan: Plan
    sent: list[int]
    received: list[int]
    counts: list[int]
    sort_r: Tensor | None
    unsort_r: Tensor | None


@dataclass(frozen=True, slots=True)
class Dispatched:
    """rows [r, h] and their routing weights [r], sorted by local expert; counts: rows of every local expert."""

    rows: Tensor
    weights: Tensor
    counts: list[int]
    handle: Handle


class ExpertExchange:
    """The exchange of one EP group.

    Args:
        group: None when this rank holds all experts.
        slot_of_expert: int64 [e]: position of every expert among all slots, in order of rank, then of local index.
        experts_per_rank: slots of every rank of the group; may be uneven, or zero.
    """

    def __init__(self, group: RowGroup | None, slot_of_expert: Tensor, experts_per_rank: list[int]):
        size = 1 if group is None else group.size
        if len(experts_per_rank) != size or sum(experts_per_rank) != slot_of_expert.numel():
            raise ValueError(f"{slot_of_expert.numel()} experts on {size} ranks, but experts_per_rank = {experts_per_rank}")
        self._group, self._slot_of_expert, self._experts_per_rank = group, slot_of_expert, list(experts_per_rank)
        self._local_experts = experts_per_rank[0 if group is None else group.rank]

    def dispatch(self, x_th: Tensor, weight_tk: Tensor, choice_tk: Tensor) -> Dispatched:
        """Send every token to its experts; collective. x_th any float dtype, weight_tk FP32 or FP64, choice_tk int64."""
        handle = self.agree(self.plan(choice_tk))
        order_n = handle.plan.order_n
        rows, weights = x_th.index_select(0, order_n // handle.plan.top_k), weight_tk.reshape(-1).index_select(0, order_n)
        rows, weights = self._send_pair(rows, weights, handle)
        return Dispatched(rows, weights, handle.counts, handle)

    def dispatch_backward(self, grad_rows: Tensor, grad_weights: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
        """Adjoint of dispatch: gradients of x_th and weight_tk. Collective."""
        rows_n, weights_n = self._return_pair(grad_rows, grad_weights, handle)
        plan = handle.plan
        return self._sum_copies(rows_n, handle), weights_n.index_select(0, plan.place_n).view(plan.tokens, plan.top_k)

    def combine(self, rows_y: Tensor, handle: Handle) -> Tensor:
        """Bring the experts' outputs [r, h] home and add up the k of every token: [t, h]. Collective."""
        return self._sum_copies(self.transfer(unsorted(rows_y, handle), handle.received, handle.sent), handle)

    def combine_backward(self, grad_th: Tensor, handle: Handle) -> Tensor:
        """Adjoint of combine: gradients of the experts' outputs [r, h], sorted by local expert. Collective."""
        rows = grad_th.index_select(0, handle.plan.order_n // handle.plan.top_k)
        return sorted_by_expert(self.transfer(rows, handle.sent, handle.received), handle)

    # --- the steps -----------------------------------------------------------------------------------------------

    def plan(self, choice_tk: Tensor) -> Plan:
        """Order the rows by expert slot, ties by token. Local."""
        slot_n = self._slot_of_expert[choice_tk.reshape(-1)]
        order_n = slot_n.argsort(stable=True)
        counts = torch.bincount(slot_n, minlength=self._slot_of_expert.numel())
        return Plan(choice_tk.shape[0], choice_tk.shape[1], order_n, inverse(order_n), counts)

    def agree(self, plan: Plan) -> Handle:
        """Tell every rank how many rows each of its experts gets. Collective, one number per expert."""
        if self._group is None:
            counts, rows = plan.slot_counts.tolist(), plan.order_n.numel()
            return Handle(plan, [rows], [rows], counts, None, None)
        local, size = self._local_experts, self._group.size
        received = self._group.all_to_all(plan.slot_counts, self._experts_per_rank, [local] * size).view(size, local)
        sent = [int(part.sum()) for part in plan.slot_counts.split(self._experts_per_rank)]
        expert_r = torch.arange(local, device=received.device).repeat(size).repeat_interleave(received.flatten())
        sort_r = expert_r.argsort(stable=True)
        return Handle(plan, sent, received.sum(1).tolist(), received.sum(0).tolist(), sort_r, inverse(sort_r))

    def transfer(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """The payload. Collective; nothing to do where all experts are here."""
        return rows if self._group is None else self._group.all_to_all(rows.contiguous(), sent, received)

    def _send_pair(self, rows: Tensor, weights: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
        if self._group is None:
            return rows, weights
        message = self.transfer(pack(rows, weights), handle.sent, handle.received)
        return unpack(sorted_by_expert(message, handle), weights.dtype)

    def _return_pair(self, rows: Tensor, weights: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
        if self._group is None:
            return rows, weights
        message = unsorted(pack(rows, weights), handle)
        return unpack(self.transfer(message, handle.received, handle.sent), weights.dtype)

    def _sum_copies(self, rows_n: Tensor, handle: Handle) -> Tensor:
        plan = handle.plan
        return rows_n.index_select(0, plan.place_n).view(plan.tokens, plan.top_k, rows_n.shape[1]).sum(1)


def pack(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows [r, h] and one number per row [r] as one message: the number's bytes become further columns of the rows' dtype."""
    return torch.cat([rows, weights.unsqueeze(1).view(rows.dtype)], dim=1)


def unpack(message: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`; `dtype` is that of the numbers."""
    columns = dtype.itemsize // message.dtype.itemsize
    rows, weights = message.split([message.shape[1] - columns, columns], dim=1)
    # a copy, always: a view as wider numbers must start at a multiple of their size
    return rows.contiguous(), weights.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(1)


def sorted_by_expert(rows: Tensor, handle: Handle) -> Tensor:
    """From order of arrival to order of local expert."""
    return rows if handle.sort_r is None else rows.index_select(0, handle.sort_r)


def unsorted(rows: Tensor, handle: Handle) -> Tensor:
    """From order of local expert to order of arrival."""
    return rows if handle.unsort_r is None else rows.index_select(0, handle.unsort_r)


def inverse(permutation: Tensor) -> Tensor:
    """`inverse(p)[p[i]] == i`."""
    places = torch.empty_like(permutation)
    places[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return places
