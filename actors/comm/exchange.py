"""Dispatch and combine: tokens to the ranks that hold their experts, and back.

A token goes to a rank once, whatever number of its experts live there, with its routing weights for them; the rank gathers
it for each, and sums their outputs before it sends one row back. As many rows travel as it takes, no token is dropped.

In one hop a token goes straight to each of those ranks. In two hops it crosses to a node once, to the rank with its own index
there, which forwards it inside the node; combine sums inside the node first and sends one row back across. Which rows arrive,
and in which order the experts see them, is the same; only the sums of combine and of dispatch's backward associate otherwise.

How many rows go where is known from the choice alone. `announce` sends these counts, those of both hops in one message, and
may be called as soon as the gate has chosen, from any thread, while other transfers run; `dispatch` then waits for them.
Combine and both backwards reuse them.
Name suffixes: t tokens, k experts of a token, h hidden; m ranks of the EP group; q rows received; r rows of experts, sorted
by local expert, then by source rank, then by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.comm import float8
from actors.comm.hops import NOT_CHOSEN, Hop, HopRows, Pending, RowGroup, by_source, sum_rows
from actors.comm.traffic import Traffic


@dataclass(frozen=True, slots=True)
class TwoHops:
    """The groups of the payload. The EP group's ranks are rows x width, in this order; a row is on one node.

    rail: the ranks with this rank's width index, by row. inside: the ranks of this rank's row, by width index.
    """

    rail: RowGroup
    inside: RowGroup


@dataclass(frozen=True, slots=True)
class PendingDispatch:
    """Where this rank's tokens go, and the counts under way. place_tk: rank * slots + local slot of every choice.

    goes: which members of the first hop's group a token goes to: bool [members, t].
    """

    place_tk: Tensor
    goes: Tensor | None
    counts: Pending | None


@dataclass(frozen=True, slots=True)
class Handle:
    """What combine and the backward of both need of a dispatch. crossings: one for each hop. rows: q.

    row_r: received row of every expert's row; cell_r: row * numbers + number, where its routing weight is.
    """

    place_tk: Tensor
    crossings: tuple[HopRows, ...]
    rows: int
    row_r: Tensor
    cell_r: Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """rows [r, h] and their routing weights [r], sorted by local expert; counts: rows of every local expert."""

    rows: Tensor
    weights: Tensor
    counts: list[int]
    handle: Handle


class ExpertExchange:
    """The exchange of one EP group. What a call needs of another is in its handle, so calls of several streams may alternate.

    Args:
        group: None when this rank holds all experts.
        slot_of_expert: int64 [e]: position of every expert among all slots, in order of rank, then of local index.
        experts_per_rank: slots of every rank of the group; may be uneven, or zero.
        two_hops: None: one hop. With them `group` carries the counts only.
        counts: a second group of the same ranks for the counts of one hop; without it `announce` may not run beside transfers.
        nodes: node of every rank of the group, to count what crosses; by default each has its own.
        float8_rows: what dispatch-type transfers carry (the rows of dispatch and of combine's backward) is rounded to FP8, even if
            it stays on this rank: what an expert sees does not depend on where it lives.
        traffic: where bytes sent are counted.
    Raises ValueError: numbers that contradict each other.
    """

    def __init__(self, group: RowGroup | None, slot_of_expert: Tensor, experts_per_rank: list[int], *,
                 two_hops: TwoHops | None = None, counts: RowGroup | None = None, nodes: tuple[str, ...] | None = None,
                 float8_rows: bool = False, traffic: Traffic | None = None):
        size = 1 if group is None else group.size
        if len(experts_per_rank) != size or sum(experts_per_rank) != slot_of_expert.numel():
            raise ValueError(f"{slot_of_expert.numel()} experts on {size} ranks, but experts_per_rank = {experts_per_rank}")
        if two_hops and (group is None or two_hops.rail.size * two_hops.inside.size != size):
            raise ValueError(f"{two_hops.rail.size} rows of {two_hops.inside.size} ranks are not {size} ranks")
        self._size, self._slots, self._float8 = size, max(experts_per_rank), float8_rows
        self._local = experts_per_rank[0 if group is None else group.rank]
        self._counts = counts or group
        self._width = two_hops.inside.size if two_hops else 1
        self.traffic = traffic or Traffic()
        self._hops = () if group is None else self._made_of(group, two_hops, nodes or tuple(map(str, range(size))))
        places = torch.cat([rank * self._slots + torch.arange(count) for rank, count in enumerate(experts_per_rank)])
        self._place_of_expert = places.to(slot_of_expert.device)[slot_of_expert]

    def announce(self, choice_tk: Tensor) -> PendingDispatch:
        """Start to tell the other ranks how many rows come. Returns at once; collective, in the order of the dispatches."""
        place_tk = self._place_of_expert[choice_tk.flatten()].view_as(choice_tk)
        if not self._hops:
            return PendingDispatch(place_tk, None, None)
        goes_tm = torch.zeros(len(place_tk), self._size, dtype=torch.bool, device=place_tk.device)
        goes_mt = goes_tm.scatter_(1, place_tk // self._slots, True).t().contiguous()
        goes, count_m = goes_mt, goes_mt.sum(1)
        if self._width > 1:
            goes = goes_mt.view(self._size // self._width, self._width, -1).any(1)
            # a row's second number is for the rank on this one's rail; the others do not read it
            count_m = torch.stack([count_m, goes.sum(1).repeat_interleave(self._width)], dim=1)
        return PendingDispatch(place_tk, goes, self._counts.start_all_to_all(count_m, [1] * self._size, [1] * self._size))

    def dispatch(self, x_th: Tensor, weight_tk: Tensor, choice_tk: Tensor, announced: PendingDispatch | None = None) -> Dispatched:
        """Send every token to its experts; collective. x_th any float dtype, weight_tk FP32 or FP64, choice_tk int64.

        announced: of this choice, if that was done before.
        """
        announced = announced or self.announce(choice_tk)
        rows = float8.encode(x_th, power_of_two=True) if self._float8 else x_th
        if self._hops:
            rows, numbers, crossings, order = self._travel(rows, weight_tk, announced)
        else:
            numbers, crossings, order = weight_tk, (), None
        slot_r, cell_r = self._cells(announced.place_tk, numbers, order)
        row_r = cell_r // numbers.shape[1]
        handle = Handle(announced.place_tk, crossings, rows.shape[0], row_r, cell_r)
        counts = torch.bincount(slot_r, minlength=self._local).tolist()
        return Dispatched(self._decoded(rows.index_select(0, row_r), x_th), numbers.flatten().index_select(0, cell_r),
                          counts, handle)

    def dispatch_backward(self, grad_rows: Tensor, grad_weights: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
        """Adjoint of dispatch: gradients of x_th and weight_tk. Collective."""
        place_tk = handle.place_tk
        rows, slots = sum_rows(grad_rows, handle.row_r, handle.rows), self._slots if self._hops else place_tk.shape[1]
        numbers = grad_weights.new_zeros(handle.rows * slots).index_copy_(0, handle.cell_r, grad_weights)
        numbers = numbers.view(handle.rows, slots)
        for hop, crossing in zip(reversed(self._hops), reversed(handle.crossings)):
            rows, numbers = hop.back(rows, numbers, crossing)
        return rows, numbers.gather(1, place_tk) if self._hops else numbers

    def combine(self, rows_y: Tensor, handle: Handle) -> Tensor:
        """Sum the experts' outputs [r, h] of every token, first where they are, then on its way home: [t, h]. Collective."""
        rows = sum_rows(rows_y, handle.row_r, handle.rows)
        for hop, crossing in zip(reversed(self._hops), reversed(handle.crossings)):
            rows, _ = hop.back(rows, None, crossing)
        return rows

    def combine_backward(self, grad_th: Tensor, handle: Handle) -> Tensor:
        """Adjoint of combine: gradients of the experts' outputs [r, h], sorted by local expert. Collective."""
        rows = float8.encode(grad_th, power_of_two=False) if self._float8 else grad_th
        for hop, crossing in zip(self._hops, handle.crossings):
            rows, _ = hop.out(rows, None, crossing)
        return self._decoded(rows.index_select(0, handle.row_r), grad_th)

    # --- the steps -----------------------------------------------------------------------------------------------

    def _made_of(self, group: RowGroup, two_hops: TwoHops | None, nodes: tuple[str, ...]) -> tuple[Hop, ...]:
        if two_hops is None:
            return (Hop(group, self._slots, nodes, self.traffic),)
        width = self._width
        row, index = group.rank // width, group.rank % width
        return (Hop(two_hops.rail, width * self._slots, nodes[index::width], self.traffic),
                Hop(two_hops.inside, self._slots, nodes[row * width : (row + 1) * width], self.traffic))

    def _travel(self, rows: Tensor, weight_tk: Tensor, announced: PendingDispatch) -> tuple[
            Tensor, Tensor, tuple[HopRows, ...], Tensor | None]:
        """All hops: rows and numbers received, how they came, and their order source by source if it is another one."""
        tokens, whole = weight_tk.shape[0], self._size * self._slots
        numbers = weight_tk.new_full((tokens, whole), NOT_CHOSEN).scatter_(1, announced.place_tk, weight_tk)
        arrived = announced.counts.wait()
        if self._width == 1:
            crossing = HopRows.of(announced.goes, arrived.tolist())
            return *self._hops[0].out(rows, numbers, crossing), (crossing,), None
        rail, inside = self._hops
        from_rw, crossed_rw = arrived.view(rail.group.size, self._width, 2).unbind(2)
        first = HopRows.of(announced.goes, crossed_rw[:, inside.group.rank].tolist())
        rows, numbers = rail.out(rows, numbers, first)
        second = HopRows.of(inside.chosen(numbers), from_rw.sum(0).tolist())
        rows, numbers = inside.out(rows, numbers, second)
        return rows, numbers, (first, second), by_source(from_rw.t())

    def _cells(self, place_tk: Tensor, numbers: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Local slot of every expert's row, and the cell of `numbers` with its weight."""
        if not self._hops:
            return place_tk.flatten().sort(stable=True)
        slots = self._slots
        chosen = numbers if order is None else numbers.index_select(0, order)
        cell_r = (chosen != NOT_CHOSEN).flatten().nonzero().squeeze(1)
        slot_r, by_slot = (cell_r % slots).sort(stable=True)
        cell_r = cell_r.index_select(0, by_slot)
        return slot_r, cell_r if order is None else order.index_select(0, cell_r // slots) * slots + slot_r

    def _decoded(self, rows: Tensor, like: Tensor) -> Tensor:
        return float8.decode(rows, like.shape[1], like.dtype) if self._float8 else rows
