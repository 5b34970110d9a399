"""One hop of dispatch and combine: rows to some members of a process group, and back.

A row goes to a member once. Beside every row travel numbers for the slots behind each member: a routing weight where the row
chose that slot, NOT_CHOSEN elsewhere. Out, a member gets the numbers of its own slots; back, they are put in their places.
Name suffixes: n rows here, c columns, m rows sent, one per (row, member), in order of member, then row; q rows received, in
order of the sender, then as it sent them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.comm.traffic import Traffic, split

NOT_CHOSEN = -1.0  # routing weights are never negative; one that is undefined counts as chosen


class Pending(Protocol):
    def wait(self) -> Tensor:
        """The rows received. Raises Aborted."""


class RowGroup(Protocol):
    """What is needed of a process group."""

    size: int
    rank: int

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Rows [n, ...], contiguous, in order of the receiving member; returns those received, in order of the sender."""

    def start_all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Pending:
        """The same, without waiting for it; `rows` must stay unchanged until then."""


@dataclass(frozen=True, slots=True)
class HopRows:
    """Which rows take a hop. rows: n. row_m: which row every row sent is; cell_m: row * members + member.

    sent, received: rows to and from every member.
    """

    rows: int
    row_m: Tensor
    cell_m: Tensor
    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, goes_mn: Tensor, received: list[int]) -> HopRows:
        """goes_mn: bool [members, n], whether a row goes to a member."""
        member_m, row_m = goes_mn.nonzero(as_tuple=True)
        members, rows = goes_mn.shape
        return cls(rows, row_m, row_m * members + member_m, goes_mn.sum(1).tolist(), received)


@dataclass(frozen=True, slots=True)
class Hop:
    """A group whose members have `slots` slots behind each of them. nodes: of every member."""

    group: RowGroup
    slots: int
    nodes: tuple[str, ...]
    traffic: Traffic

    def chosen(self, numbers: Tensor) -> Tensor:
        """Which members the rows with these numbers [n, members * slots] go to: bool [members, n]."""
        return (numbers.view(numbers.shape[0], self.group.size, self.slots) != NOT_CHOSEN).any(2).t()

    def out(self, rows: Tensor, numbers: Tensor | None, crossing: HopRows) -> tuple[Tensor, Tensor | None]:
        """rows [n, c], numbers [n, members * slots] or None. Returns rows [q, c], numbers [q, slots]. Collective."""
        if numbers is None:
            return self._transfer(rows.index_select(0, crossing.row_m), crossing.sent, crossing.received), None
        cells = numbers.view(crossing.rows * self.group.size, self.slots).index_select(0, crossing.cell_m)
        headers = cells.view(rows.dtype)
        message = rows.new_empty(headers.shape[0], rows.shape[1] + headers.shape[1])
        # each row straight to its place: `pack` would copy it a second time
        torch.index_select(rows, 0, crossing.row_m, out=message[:, : rows.shape[1]])
        message[:, rows.shape[1] :] = headers
        return unpack(self._transfer(message, crossing.sent, crossing.received), numbers.dtype, self.slots)

    def back(self, rows: Tensor, numbers: Tensor | None, crossing: HopRows) -> tuple[Tensor, Tensor | None]:
        """Adjoint of `out`: what came back for a row is summed, numbers that nothing came for are zero. Collective."""
        message = rows if numbers is None else pack(rows, numbers)
        came = self._transfer(message, crossing.received, crossing.sent)
        if numbers is None:
            return sum_rows(came, crossing.row_m, crossing.rows), None
        came, cells = unpack(came, numbers.dtype, self.slots)
        whole = numbers.new_zeros(crossing.rows * self.group.size, self.slots).index_copy_(0, crossing.cell_m, cells)
        return sum_rows(came, crossing.row_m, crossing.rows), whole.view(crossing.rows, self.group.size * self.slots)

    def _transfer(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        self.traffic.add(split(sent, self.nodes, self.group.rank, rows.shape[1] * rows.element_size()))
        return self.group.all_to_all(rows.contiguous(), sent, received)


def pack(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows [n, c] and numbers [n, s] as one message: the numbers' bytes become further columns of the rows' dtype."""
    return torch.cat([rows, numbers.view(rows.dtype)], dim=1)


def unpack(message: Tensor, dtype: torch.dtype, numbers: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`; `dtype` is that of the `numbers` numbers of a row."""
    columns = numbers * dtype.itemsize // message.dtype.itemsize
    rows, cells = message.split([message.shape[1] - columns, columns], dim=1)
    # a copy, always: a view as wider numbers must start at a multiple of their size
    return rows, cells.clone(memory_format=torch.contiguous_format).view(dtype)


def sum_rows(rows: Tensor, target: Tensor, count: int) -> Tensor:
    """[count, c]: row i of the result is the sum of the rows whose target is i, in their order."""
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, target, rows)


def by_source(count_wr: Tensor) -> Tensor:
    """Where the rows of the last of two hops are, source by source: int64 [q].

    count_wr [w, r]: how many rows member w of this hop forwards from member r of the hop before. They come in order (w, r);
    the result lists them in order (r, w), as they would come straight from their sources.
    """
    first_wr = (count_wr.flatten().cumsum(0) - count_wr.flatten()).view_as(count_wr)
    count, first = count_wr.t().flatten(), first_wr.t().flatten()
    total = int(count.sum())
    shift = (first - (count.cumsum(0) - count)).repeat_interleave(count, output_size=total)
    return torch.arange(total, device=count_wr.device) + shift
