"""An abort ends what is blocked on whom it may; other tests of it are with what they abort."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from runtime import configured, form, host, on_all

from actors.comm.groups import Aborted, wait
from actors.hosts.processes import ProcessRanks

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


NUMBERS = 100_000_000


def pass_on(host):
    """The sender's side of a message of 400 MB; it is frozen in the middle of it."""
    wait(host._generation.group((0, 1)).send(torch.ones(NUMBERS), 0, 7))


def abort_in_the_middle(host, sender):
    """Freeze the sender when something of its message is there. Whether only a part was, and whether an abort ended the wait."""
    group, found, ended = host._generation.group((0, 1)), torch.zeros(NUMBERS), []

    def receive() -> None:
        try:
            wait(group.receive(found, 1, 7))
        except Aborted as error:
            ended.append(str(error))

    waiting = threading.Thread(target=receive, daemon=True)
    waiting.start()
    deadline, pause = time.monotonic() + 30, threading.Event()
    while not found[:1000].any() and time.monotonic() < deadline:
        pause.wait(0.001)
    os.kill(sender, signal.SIGSTOP)
    host._generation.abort()
    waiting.join(5)
    return bool(found[0] == 1) and bool(found[-1] == 0), bool(ended)


def test_an_abort_ends_the_wait_for_a_message_of_which_a_part_has_come():
    """gloo itself would wait for the rest until the group's timeout."""
    config, layout = configured("PP2")
    for _ in range(5):  # all of it may have come by the time that its sender is frozen
        with ProcessRanks(config, 2, host, start_method="forkserver") as own:
            form(own, config, layout, 22)
            seats, sender = own._seats, own.pids[1]
            own._seats = seats[1:]
            own.start("do", [(pass_on,)])
            own._seats = seats[:1]
            part, ended = own.start("do", [(abort_in_the_middle, sender)]).results(60)[0]
        if part:
            assert ended
            return
    pytest.fail("never frozen in the middle of a message")
