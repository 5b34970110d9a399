"""An abort ends what is blocked on whom it may; other tests of it are with what they abort."""

from __future__ import annotations

import threading

import pytest
import torch
from runtime import configured, form, on_all

from actors.comm.groups import Aborted, wait

SILENT, BLOCKED, QUICKER = 1, 2, 3


def blocked(host, group):
    """A receive from the silent rank, by the time that the next rank's connection is closed: whether an abort ends it."""
    receiving = group.receive(torch.empty(1), SILENT, 1)
    with pytest.raises(Aborted):
        wait(group.receive(torch.empty(1), QUICKER, 1))
    ended: list[str] = []

    def await_end() -> None:
        try:
            wait(receiving)
        except Aborted as error:
            ended.append(str(error))

    waiting = threading.Thread(target=await_end, daemon=True)
    waiting.start()
    group.abort()
    waiting.join(5)
    return bool(ended)


def act(host):
    group = host._generation.group((0, 1, 2, 3))
    rank = host._assignment.rank
    if rank == QUICKER:
        group.abort()
    return blocked(host, group) if rank == BLOCKED else True


def test_an_abort_ends_a_receive_though_the_next_member_has_aborted_before(ranks):
    """A frozen node: its peers wait for it, and those who let go first close their connections to the others."""
    config, layout = configured("EP4")
    form(ranks, config, layout, 21)
    assert on_all(ranks, act, layout.size) == [True] * 4
