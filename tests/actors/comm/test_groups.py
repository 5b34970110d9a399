"""Process groups between four living processes: every operation against plain arithmetic, abort, creation, leaks."""

from __future__ import annotations

import datetime
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from runtime import configured, form, meeting_place, on_all

from actors.comm.groups import Aborted, Generation
from actors.runtime import meeting as meeting_module

ALL, SOME = (0, 1, 2, 3), (0, 1, 3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64]


@pytest.fixture
def place():
    """Where the ranks of one test meet: (address, prefix)."""
    store = meeting_place()
    return ("127.0.0.1", store.port), f"test-{store.add('tests', 1)}"


def generation_of(host, rank, place, wanted, seconds=(), **options):
    """A generation that the host's control thread can abort."""
    address, prefix = place
    made = Generation(1, rank, torch.device("cpu"), "127.0.0.1", 30, **options)
    host.close()
    host.authority.generation = made
    made.create(dist.PrefixStore(prefix, host._meeting_place.at(address)), wanted, seconds)
    return made


def by_rank(ranks, function, size, *arguments):
    return ranks.start("do", [(function, rank, *arguments) for rank in range(size)]).results(60)


def values(rank, dtype, length=1001):
    """Whole numbers that every dtype and every sum of four holds exactly."""
    return torch.arange(length).add(7 * rank).remainder(50).to(dtype)


def rows_for(sender, receiver):
    return (sender + 2 * receiver) % 4 if (sender, receiver) != (1, 1) else 0


def operate(host, rank, place):
    """Every operation in two groups and in a group of one; nothing is checked here."""
    made = generation_of(host, rank, place, [ALL, SOME, (rank,), ALL] if rank != 2 else [ALL, SOME, (rank,)])
    found = {}
    for ranks in [ALL, SOME] if rank in SOME else [ALL]:
        group = made.group(ranks)
        for dtype in DTYPES:
            total = values(rank, dtype)
            group.all_reduce(total)
            gathered = torch.zeros(group.size * 6, dtype=dtype)
            mine = gathered[group.rank * 6 :][:6]
            mine.copy_(values(rank, dtype, 6))
            group.all_gather(gathered, mine)
            send = [rows_for(rank, to) for to in ranks]
            rows = torch.cat([torch.full((n, 3), 10 * rank + to) for n, to in zip(send, ranks)]).to(dtype)
            found[ranks, dtype] = total, gathered, group.all_to_all(rows, send, [rows_for(source, rank) for source in ranks])
        most = values(rank, torch.float32)
        group.all_reduce(most, dist.ReduceOp.MAX)
        rounded = torch.randn(1001, generator=torch.Generator().manual_seed(rank))
        group.all_reduce(rounded)
        group.all_reduce(torch.empty(0))
        found[ranks, "more"] = most, rounded, group.all_to_all(torch.ones(0, 2), [0] * group.size, [0] * group.size)
    alone = made.group((rank,))
    lonely = torch.full((3,), float(rank))
    alone.all_reduce(lonely)
    copy = torch.zeros(3)
    alone.all_gather(copy, lonely)
    found["alone"] = lonely, copy, alone.all_to_all(lonely.view(3, 1), [3], [3])
    return found


def test_operations(ranks, place):
    found = by_rank(ranks, operate, 4, place)
    for members in (ALL, SOME):
        for rank in members:
            for dtype in DTYPES:
                total, gathered, received = found[rank][members, dtype]
                assert torch.equal(total, sum(values(r, torch.int64) for r in members).to(dtype))
                assert torch.equal(gathered, torch.cat([values(r, dtype, 6) for r in members]))
                expected = [[10 * source + rank] * 3 for source in members for _ in range(rows_for(source, rank))]
                assert torch.equal(received, torch.tensor(expected).view(-1, 3).to(dtype)) and received.dtype == dtype
            most, rounded, nothing = found[rank][members, "more"]
            assert torch.equal(most, torch.stack([values(r, torch.float32) for r in members]).amax(0))
            assert torch.equal(rounded, found[0][members, "more"][1])  # sums that round, yet alike on all members
            exact = sum(torch.randn(1001, generator=torch.Generator().manual_seed(r)).double() for r in members)
            assert rounded.double() == pytest.approx(exact, abs=1e-6)
            assert nothing.shape == (0, 2)
    for rank in ALL:
        assert all(torch.equal(part.flatten(), torch.full((3,), float(rank))) for part in found[rank]["alone"])


def come_late(host, rank, place):
    """Rank 1 begins to meet when rank 0 has waited for longer than making a group may take."""
    made = Generation(1, rank, torch.device("cpu"), "127.0.0.1", 30, create_timeout_seconds=0.5)
    host.close()
    host.authority.generation = made
    store = dist.PrefixStore(place[1], host._meeting_place.at(place[0]))
    if rank == 1:
        store.wait(["waited"], datetime.timedelta(seconds=30))
        made.meet(store, 2, 30.0)
        return None
    with pytest.raises(Aborted, match=r"not all of 2 ranks came within 0\.6 s"):
        made.meet(dist.PrefixStore("alone", store), 2, 0.6)
    store.set("waited", "")
    return made.meet(store, 2, 30.0)


def test_ranks_may_be_longer_in_coming_than_in_making_a_group(ranks, place):
    by_rank(ranks, come_late, 2, place)


def pass_by(host, rank, place):
    """A small exchange on the second group of two ranks while the first group's is still waiting for rank 1."""
    members, store = (0, 1), host._meeting_place.at(place[0])
    made = generation_of(host, rank, place, [members], seconds=[members])
    large = torch.full((2, 1000), float(rank))
    if rank == 0:
        first = made.group(members).start_all_to_all(large, [1, 1], [1, 1])
    small = made.group(members, second=True).start_all_to_all(torch.tensor([10 + rank, 20 + rank]), [1, 1], [1, 1]).wait()
    if rank == 0:
        finished = first.work.is_completed()
        store.set(f"{place[1]}/small is here", "")
        return small, finished, first.wait()
    store.wait([f"{place[1]}/small is here"], datetime.timedelta(seconds=30))
    return small, False, made.group(members).all_to_all(large, [1, 1], [1, 1])


def test_a_second_group_does_not_wait_for_the_first(ranks, place):
    for rank, (small, finished, large) in enumerate(by_rank(ranks, pass_by, 2, place)):
        assert small.tolist() == [10 * (rank + 1), 10 * (rank + 1) + 1] and not finished
        assert torch.equal(large, torch.tensor([[0.0], [1.0]]).expand(2, 1000))


OPERATIONS = {
    "receive": lambda group: group.receive(torch.empty(4), 2, 1).wait(),
    "all_reduce": lambda group: group.all_reduce(torch.ones(100_000)),
    "all_gather": lambda group: group.all_gather(torch.empty(3000), torch.ones(1000)),
    "all_to_all": lambda group: group.all_to_all(torch.ones(30_000, 1), [10_000] * 3, [10_000] * 3),
}


def block(host, rank, place, operation):
    """Seconds from the abort to the error in the blocked thread; rank 2 takes part in nothing."""
    members = (0, 1, 2)
    made = generation_of(host, rank, place, [members])
    if rank == 2:
        return None
    aborted_at, abort = [], made.abort
    made.abort = lambda: (aborted_at.append(time.monotonic()), abort())
    host._meeting_place.at(place[0]).set(f"{operation}-{rank}", "blocks now")
    with pytest.raises((Aborted, RuntimeError)) as caught:
        OPERATIONS[operation](made.group(members))
    seconds = time.monotonic() - aborted_at[0]
    assert operation == "receive" or caught.type is Aborted
    with pytest.raises(Aborted):  # and so does whatever is started later
        made.group(members).all_reduce(torch.ones(1))
    return seconds


@pytest.mark.parametrize("operation", OPERATIONS)
def test_abort_ends_what_is_blocked(ranks, place, operation):
    calls = ranks.start("do", [(block, rank, place, operation) for rank in range(3)])
    meeting_place().wait([f"{operation}-0", f"{operation}-1"])
    ranks.abort()
    seconds = calls.results(20)[:2]
    assert max(seconds) < 0.2, seconds


def form_short(host, rank, place):
    started = time.monotonic()
    with pytest.raises(Aborted, match="group of 3 ranks did not form") as caught:
        generation_of(host, rank, place, [(0, 1, 2)], create_timeout_seconds=0.5)
    return time.monotonic() - started, str(caught.value)


def test_a_missing_member_bounds_the_creation(ranks, place):
    for seconds, text in by_rank(ranks, form_short, 2, place):
        assert 0.4 < seconds < 5 and "\n" not in text


def test_a_closed_group_is_closed_for_all_who_hold_it(ranks, place):
    by_rank(ranks, make_pair, 2, place)
    on_all(ranks, use_after_close, 2)


def make_pair(host, rank, place):
    generation_of(host, rank, place, [(0, 1)])


def use_after_close(host):
    group = host._generation.group((0, 1))
    host.close()
    with pytest.raises(Aborted, match="closed"):
        group.all_reduce(torch.ones(1))
    group.abort()  # of no effect


def meeting(host):
    return id(host._meeting_place._found[1])


def test_a_rank_connects_to_the_store_once(ranks):
    """torch looks up names whenever a TCPStore connects; where DNS is slow that would stop every new generation."""
    found = []
    for number in range(3):
        form(ranks, *configured(), generation=number)
        found.append(on_all(ranks, meeting, 4))
    assert found[0] == found[1] == found[2]


def connect_nowhere(host):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = "127.0.0.1", server.port
    host._meeting_place.at(address)
    del server
    host._meeting_place._found[1].set_timeout(datetime.timedelta(seconds=1))
    with pytest.raises(Aborted, match=f"no store at 127.0.0.1:{address[1]}"):
        host._meeting_place.at(address)


def test_a_store_that_is_gone_is_told(ranks):
    ranks.start("do", [(patient_for, 0.5)]).results(60)
    ranks.start("do", [(connect_nowhere,)]).results(60)
    ranks.start("do", [(patient_for, 60.0)]).results(60)


def patient_for(host, seconds):
    meeting_module.CREATE_TIMEOUT_SECONDS = seconds


def resources(host):
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()


def test_twenty_generations_leak_nothing(ranks):
    """Alternating layouts and, every other time, an abort; the same processes."""
    layouts = [configured(name) for name in ("PP2xEP2", "PP4", "PP2xDP2")]
    counts = []
    for number in range(20):
        form(ranks, *layouts[number % 3], generation=number)
        if number % 2:
            ranks.abort()
        ranks.start("close", [()] * 4).results(60)
        counts.append(on_all(ranks, resources, 4))
    assert counts[19] == counts[4]
