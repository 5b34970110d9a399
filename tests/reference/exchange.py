"""Dispatch and combine with plain loops, and process groups that live in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.comm.exchange import TwoHops


class Fabric:
    """Connects `size` threads; every thread asks for its `group(rank)`."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.mail: dict[tuple[int, int], torch.Tensor] = {}

    def group(self, rank: int) -> ThreadGroup:
        return ThreadGroup(self, rank)


@dataclass(frozen=True)
class ThreadGroup:
    fabric: Fabric
    rank: int

    @property
    def size(self) -> int:
        return self.fabric.size

    def all_to_all(self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> torch.Tensor:
        assert rows.is_contiguous() and sum(send_counts) == len(rows) and len(send_counts) == self.size
        for to, part in enumerate(rows.split(send_counts)):
            self.fabric.mail[self.rank, to] = part.clone()
        self.fabric.barrier.wait()
        parts = [self.fabric.mail[source, self.rank] for source in range(self.size)]
        self.fabric.barrier.wait()
        assert [len(part) for part in parts] == receive_counts
        return torch.cat(parts)

    def start_all_to_all(self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> Later:
        return Later(self, rows, send_counts, receive_counts)


@dataclass(frozen=True)
class Later:
    """An exchange that takes place when it is waited for."""

    group: ThreadGroup
    rows: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]

    def wait(self) -> torch.Tensor:
        return self.group.all_to_all(self.rows, self.send_counts, self.receive_counts)


class Grid:
    """The fabrics of an EP group of `rows` x `width` ranks: of all, of every rail, of every row."""

    def __init__(self, rows: int, width: int):
        self.rows, self.width = rows, width
        self.all = Fabric(rows * width)
        self.rails, self.insides = [Fabric(rows) for _ in range(width)], [Fabric(width) for _ in range(rows)]

    @property
    def fabrics(self) -> list[Fabric]:
        return [self.all, *self.rails, *self.insides]

    def two_hops(self, rank: int) -> TwoHops:
        row, index = divmod(rank, self.width)
        return TwoHops(self.rails[index].group(row), self.insides[row].group(index))


def on_ranks(size: int, work: Callable[[ThreadGroup], Any], grid: Grid | None = None) -> list[Any]:
    """Run `work(group)` for every rank at once; the results by rank. Raises what the first failing rank raised.

    grid: what else `work` communicates on.
    """
    fabrics, results, errors = grid.fabrics if grid else [Fabric(size)], [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(fabrics[0].group(rank))
        except Exception as error:
            errors.append(error)
            for fabric in fabrics:
                fabric.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def skewed_choice(rng: np.random.Generator, tokens: int, experts: int, top_k: int, skew: float) -> torch.Tensor:
    """int64 [tokens, top_k], distinct in a row. Skew 0: all experts alike; the larger, the more the first ones get."""
    popularity = np.exp(-skew * np.arange(experts))
    rows = [rng.choice(experts, top_k, replace=False, p=popularity / popularity.sum()) for _ in range(tokens)]
    return torch.tensor(np.array(rows, dtype=np.int64).reshape(tokens, top_k))


def slow_dispatch(choices: list[torch.Tensor], experts_of_rank: list[list[int]]) -> list[list[list[tuple[int, int, int]]]]:
    """For every rank and each of its experts: the (source rank, token, k) of the rows it receives, in order."""
    return [[[(source, token, k)
              for source, choice in enumerate(choices)
              for token, chosen in enumerate(choice.tolist())
              for k, e in enumerate(chosen) if e == expert]
             for expert in experts] for experts in experts_of_rank]
