"""Dispatch and combine: tokens to the ranks that hold their experts, and back.

A token goes to a rank once, whatever number of its experts live there, with its routing weights for them; the rank gathers
it for each, and sums their outputs before it sends one row back. As many rows travel as it takes, no token is dropped.
The steps are separate, so they can be run apart: `plan` (local), `agree` (counts, a small message), `transfer` (the payload)
with `pack` and `unpack` around it, then reading what came (local). Combine and both backwards reuse the plan and its counts.
Name suffixes: t tokens, k experts of a token, h hidden, s slots of a rank (padded to the largest); m rows sent, one per
(token, rank), in order of rank, then token; q rows received; r rows of experts, sorted by local expert, then as received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_NOT_CHOSEN = -1.0  # routing weights are never negative


class RowGroup(Protocol):
    """What is needed of a process group."""

    size: int
    rank: int

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Rows [n, ...], contiguous, in order of the receiving member; returns those received, in order of the sender."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where this rank's tokens go. place_tk: rank * s + local slot of every choice. rank_m, token_m: of every row sent.

    sent: rows to every rank. Without a group a row is a token, and token_m and rank_m are None.
    """

    place_tk: Tensor
    rank_m: Tensor | None
    token_m: Tensor | None
    sent: list[int]


@dataclass(frozen=True, slots=True)
class Handle:
    """A plan whose counts all ranks know, and what came in; good for one dispatch, its combine, and the backward of both.

    received: rows from every rank. row_r, slot_r: received row and local slot of every expert's row.
    """

    plan: Plan
    received: list[int]
    row_r: Tensor
    slot_r: Tensor


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
        self._group, self._size, self._slots = group, size, max(experts_per_rank)
        self._local = experts_per_rank[0 if group is None else group.rank]
        places = torch.cat([rank * self._slots + torch.arange(count) for rank, count in enumerate(experts_per_rank)])
        self._place_of_expert = places.to(slot_of_expert.device)[slot_of_expert]

    def dispatch(self, x_th: Tensor, weight_tk: Tensor, choice_tk: Tensor) -> Dispatched:
        """Send every token to its experts; collective. x_th any float dtype, weight_tk FP32 or FP64, choice_tk int64."""
        plan = self.plan(choice_tk)
        weight_ms = self._spread(weight_tk, plan, _NOT_CHOSEN)
        if self._group is None:
            return self._read(x_th, weight_ms, plan, plan.sent)
        received = self.agree(plan)
        message = self.transfer(pack(x_th.index_select(0, plan.token_m), weight_ms), plan.sent, received)
        return self._read(*unpack(message, weight_tk.dtype, self._slots), plan, received)

    def dispatch_backward(self, grad_rows: Tensor, grad_weights: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
        """Adjoint of dispatch: gradients of x_th and weight_tk. Collective."""
        plan, dtype, count = handle.plan, grad_weights.dtype, sum(handle.received)
        rows, weights = _sum_rows(grad_rows, handle.row_r, count), grad_weights.new_zeros(count, self._slots)
        weights[handle.row_r, handle.slot_r] = grad_weights
        if self._group is not None:
            rows, weights = unpack(self.transfer(pack(rows, weights), handle.received, plan.sent), dtype, self._slots)
        return self._home(rows, plan), self._collect(weights, plan)

    def combine(self, rows_y: Tensor, handle: Handle) -> Tensor:
        """Sum the experts' outputs [r, h] of every token, first where they are, then at home: [t, h]. Collective."""
        rows = _sum_rows(rows_y, handle.row_r, sum(handle.received))
        return self._home(self.transfer(rows, handle.received, handle.plan.sent), handle.plan)

    def combine_backward(self, grad_th: Tensor, handle: Handle) -> Tensor:
        """Adjoint of combine: gradients of the experts' outputs [r, h], sorted by local expert. Collective."""
        plan = handle.plan
        if self._group is not None:
            grad_th = self.transfer(grad_th.index_select(0, plan.token_m), plan.sent, handle.received)
        return grad_th.index_select(0, handle.row_r)

    # --- the steps -----------------------------------------------------------------------------------------------

    def plan(self, choice_tk: Tensor) -> Plan:
        """Which tokens go to which rank. Local."""
        place_tk = self._place_of_expert[choice_tk]
        tokens = choice_tk.shape[0]
        if self._group is None:
            return Plan(place_tk, None, None, [tokens])
        goes_rt = torch.zeros(self._size, tokens, dtype=torch.bool, device=choice_tk.device)
        goes_rt[place_tk // self._slots, torch.arange(tokens, device=choice_tk.device).unsqueeze(1)] = True
        rank_m, token_m = goes_rt.nonzero(as_tuple=True)
        return Plan(place_tk, rank_m, token_m, goes_rt.sum(1).tolist())

    def agree(self, plan: Plan) -> list[int]:
        """Rows that come from every rank. Collective, one number per rank."""
        sent = torch.tensor(plan.sent, device=plan.place_tk.device)
        return self._group.all_to_all(sent, [1] * self._size, [1] * self._size).tolist()

    def transfer(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """The payload. Collective; nothing to do where all experts are here."""
        return rows if self._group is None else self._group.all_to_all(rows.contiguous(), sent, received)

    def _read(self, rows_q: Tensor, weight_qs: Tensor, plan: Plan, received: list[int]) -> Dispatched:
        """A row for each local expert that a received row is for. Local."""
        chosen_sq = (weight_qs[:, : self._local] >= 0).t()
        slot_r, row_r = chosen_sq.nonzero(as_tuple=True)
        handle = Handle(plan, received, row_r, slot_r)
        return Dispatched(rows_q.index_select(0, row_r), weight_qs[row_r, slot_r], chosen_sq.sum(1).tolist(), handle)

    def _spread(self, weight_tk: Tensor, plan: Plan, empty: float) -> Tensor:
        """[m, s]: a token's weights for the slots of one rank, `empty` where it chose none."""
        spread = weight_tk.new_full((weight_tk.shape[0], self._size * self._slots), empty).scatter_(1, plan.place_tk, weight_tk)
        if plan.token_m is None:
            return spread
        return spread.view(-1, self._size, self._slots)[plan.token_m, plan.rank_m]

    def _collect(self, weight_ms: Tensor, plan: Plan) -> Tensor:
        """Inverse of `_spread`: [t, k]."""
        if plan.token_m is not None:
            spread = weight_ms.new_zeros(plan.place_tk.shape[0], self._size, self._slots)
            spread[plan.token_m, plan.rank_m] = weight_ms
            weight_ms = spread.flatten(1)
        return weight_ms.gather(1, plan.place_tk)

    @staticmethod
    def _home(rows_m: Tensor, plan: Plan) -> Tensor:
        """Sum what the ranks sent back for every token: [t, h]."""
        return rows_m if plan.token_m is None else _sum_rows(rows_m, plan.token_m, plan.place_tk.shape[0])


def pack(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows [n, h] and numbers [n, s] as one message: the numbers' bytes become further columns of the rows' dtype."""
    return torch.cat([rows, weights.view(rows.dtype)], dim=1)


def unpack(message: Tensor, dtype: torch.dtype, numbers: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`; `dtype` is that of the `numbers` numbers of a row."""
    columns = numbers * dtype.itemsize // message.dtype.itemsize
    rows, weights = message.split([message.shape[1] - columns, columns], dim=1)
    # a copy, always: a view as wider numbers must start at a multiple of their size
    return rows, weights.clone(memory_format=torch.contiguous_format).view(dtype)


def _sum_rows(rows: Tensor, target: Tensor, count: int) -> Tensor:
    """[count, h]: row i of the result is the sum of the rows whose target is i, in their order."""
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, target, rows)
