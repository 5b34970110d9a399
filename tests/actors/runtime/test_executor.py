"""The executor and its links, with stages that only note what happened."""

from __future__ import annotations

from enum import StrEnum

import pytest
import torch

from actors.comm.links import Links
from actors.model.chunk import Lane, Microbatch, Segment
from actors.model.weights import WeightGradients
from actors.runtime import executor as executor_module
from actors.runtime.exchange_lane import ExchangeLane
from actors.runtime.executor import ActionFailed, Executor, StepWork
from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Payload, Program, Reduce, SplitAction, Transfer

F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


class Done:
    def wait(self):
        pass


class Loop:
    """A group whose only member sends to itself: what is sent under a tag is what the receive of that tag gets."""

    def __init__(self):
        self.posted, self.log = {}, []

    def receive(self, tensor, member, tag):
        self.log.append(("receive", member, tag, tuple(tensor.shape)))
        self.posted[tag] = tensor
        return Done()

    def send(self, tensor, member, tag):
        self.log.append(("send", member, tag, tuple(tensor.shape)))
        self.posted[tag].copy_(tensor)
        return Done()


class Stage:
    """A middle stage: forward adds one, backward doubles and defers a weight gradient."""

    first = last = False

    def __init__(self, log, queue):
        self.log, self.queue = log, queue

    def forward(self, tape):
        def run():
            self.log.append(("F", tape.sequences))
            tape.output = None if tape.input is None else tape.input + 1
        return [Segment(Lane.COMPUTE, "forward", 0, run)]

    def backward(self, tape):
        def run(half):
            self.log.append((f"I{half}", tape.sequences))
            self.queue.defer(lambda: self.log.append((f"W{half}", tape.sequences)))
            tape.input_gradient = None if tape.output_gradient is None else tape.output_gradient * 2
        return [Segment(Lane.COMPUTE, f"half {half}", 0, lambda half=half: run(half)) for half in (1, 2)]


class Bench:
    """An executor at position 3 of generation 5, its links in a loop; the step has microbatches of 2 and of 0 sequences."""

    def __init__(self, reduce=lambda: None, exchanges=None):
        self.log, self.group = [], Loop()
        queue = WeightGradients()
        self.executor = Executor(1, 5, {0: Stage(self.log, queue)}, queue, exchanges=exchanges)
        self.tapes = {(0, n): Microbatch(count, 4, None, None, True) for n, count in enumerate((2, 0))}
        self.links = Links(self.group, torch.float32, torch.device("cpu"), lambda slot, n: (2, 4, 3) if n == 0 else None)
        self.work = StepWork(self.tapes, self.links, reduce)

    def run(self, *actions, orders=()):
        self.executor.run(Program(3, 2, actions, orders), self.work)


def compute(kind, microbatch=0):
    return Compute(kind, 1, 0, microbatch)


def transfer(kind, payload, microbatch=0, tag=8):
    return Transfer(kind, payload, 2, 1, 0, microbatch, tag)


def test_a_kind_without_a_handler_is_refused_when_the_rank_starts(monkeypatch):
    more = {**{kind.name: kind.value for kind in ActionKind}, "PREFETCH": "P"}
    monkeypatch.setattr(executor_module, "ActionKind", StrEnum("ActionKind", more))
    with pytest.raises(ValueError, match="no handler for .*PREFETCH"):
        Executor(0, 1, {}, WeightGradients())


@pytest.fixture
def lane():
    lane = ExchangeLane()
    yield lane
    lane.close()


@pytest.mark.parametrize("broken, position_in_program", [("F", 1), ("reduce", 2)])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_failure_names_where_it_happened(broken, position_in_program, overlap, lane):
    def fail():
        raise RuntimeError("connection closed by peer")

    bench = Bench(reduce=fail, exchanges=lane if overlap else None)
    actions = [transfer(ActionKind.RECEIVE, Payload.ACTIVATION), compute(F), Reduce()]
    if broken == "F":
        bench.executor._chunks[0].forward = lambda tape: [Segment(Lane.EXCHANGE, "dispatch", 0, fail)]
    with pytest.raises(ActionFailed) as caught:
        bench.run(*actions)
    failure = caught.value
    assert (failure.generation, failure.position, failure.action) == (5, 3, str(actions[position_in_program]))
    assert str(failure) == (f"generation 5, position 3, action {actions[position_in_program]}: "
                            "RuntimeError: connection closed by peer")
    assert isinstance(failure.__cause__, RuntimeError)


def test_forward_and_backward_pass_tensors_on():
    bench = Bench()
    bench.run(
        transfer(ActionKind.RECEIVE, Payload.ACTIVATION, tag=0), transfer(ActionKind.RECEIVE, Payload.GRADIENT, tag=1))
    bench.group.posted[0].fill_(4)
    bench.group.posted[1].fill_(8)
    arrived, gradient = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    bench.group.posted |= {10: arrived, 11: gradient}
    bench.run(compute(F), transfer(ActionKind.SEND, Payload.ACTIVATION, tag=10), compute(B),
              transfer(ActionKind.SEND, Payload.GRADIENT, tag=11))
    assert torch.equal(arrived, torch.full((2, 4, 3), 5.0)) and torch.equal(gradient, torch.full((2, 4, 3), 16.0))
    assert bench.links.bytes_sent == 2 * arrived.numel() * 4
    assert bench.tapes[0, 0].output is None and bench.tapes[0, 0].input_gradient is None  # sent is let go
    assert [name for name, _ in bench.log] == ["F", "I1", "W1", "I2", "W2"]  # B: weights right after each part
    lanes = [span.lane for span in bench.work.spans]
    assert lanes.count("pipeline") == 2 and lanes.count("compute") == 5


def test_weight_gradients_wait_for_their_own_action():
    bench = Bench()
    receives = [transfer(ActionKind.RECEIVE, payload, tag=tag) for tag, payload in enumerate(Payload)]
    bench.run(*receives, compute(F), compute(I), compute(F, 1), compute(I, 1), compute(W, 1), compute(W))
    assert bench.log == [("F", 2), ("I1", 2), ("I2", 2), ("F", 0), ("I1", 0), ("I2", 0),
                         ("W1", 0), ("W2", 0), ("W1", 2), ("W2", 2)]
    assert not bench.work.deferred


def test_a_pair_alternates():
    bench = Bench()
    bench.run(transfer(ActionKind.RECEIVE, Payload.GRADIENT), Pair(compute(F, 1), compute(B)))
    assert bench.log == [("F", 0), ("I1", 2), ("W1", 2), ("I2", 2), ("W2", 2)]


@pytest.mark.parametrize("order, names", [
    ((1, ~1, 1, ~1, 0), ["I1", "W1", "I2", "W2", "F"]), ((1, 0, 1, ~1, ~1), ["I1", "F", "I2", "W1", "W2"])])
def test_a_pair_runs_in_the_programs_order(order, names):
    bench = Bench()
    form = (F, 0, 1), (B, 0, 1)
    bench.run(transfer(ActionKind.RECEIVE, Payload.GRADIENT), Pair(compute(F, 1), compute(B)), orders=((form, order),))
    assert [name for name, _ in bench.log] == names


def test_the_order_of_halves_is_their_own_also_for_weight_gradients_that_come_later():
    bench = Bench()
    arriving(bench)
    orders = ((((F, 0, 2),), (1, 0)), (((I, 0, 2),), (1, 1, 0, 0)), (((W, 0, 2),), (~0,) * 4))
    bench.run(SplitAction(compute(F)), compute(I), compute(W), orders=orders)
    assert [name for name, _ in bench.log] == ["F", "F", "I1", "I2", "I1", "I2", "W1", "W2", "W1", "W2"]


def test_an_order_that_leaves_something_out_fails_in_its_action():
    bench = Bench()
    with pytest.raises(ActionFailed, match="action B0.0: ValueError: the program's order .* is not one of B0.0 with 2 segments"):
        bench.run(transfer(ActionKind.RECEIVE, Payload.GRADIENT), compute(B), orders=((((B, 0, 1),), (0, 0, ~0)),))


def test_each_of_two_backwards_keeps_its_own_weight_gradients():
    bench = Bench()
    receives = [transfer(ActionKind.RECEIVE, payload, tag=tag) for tag, payload in enumerate(Payload)]
    bench.run(*receives, compute(F), compute(F, 1), Pair(compute(B, 1), compute(I)))
    assert bench.log[2:] == [("I1", 0), ("W1", 0), ("I1", 2), ("I2", 0), ("W2", 0), ("I2", 2)]
    bench.log.clear()
    bench.run(compute(W))
    assert bench.log == [("W1", 2), ("W2", 2)]


def test_weight_gradients_fill_the_other_half_of_a_pair():
    bench = Bench()
    receives = [transfer(ActionKind.RECEIVE, payload, tag=tag) for tag, payload in enumerate(Payload)]
    bench.run(*receives, compute(F), compute(I), compute(F, 1), Pair(compute(B, 1), compute(W)))
    assert bench.log[4:] == [("I1", 0), ("W1", 0), ("W1", 2), ("I2", 0), ("W2", 0), ("W2", 2)]


def arriving(bench):
    """Microbatch 0's activation and gradient arrive; returns what is to be sent of it."""
    bench.run(transfer(ActionKind.RECEIVE, Payload.ACTIVATION, tag=0), transfer(ActionKind.RECEIVE, Payload.GRADIENT, tag=1))
    for tag in (0, 1):
        bench.group.posted[tag].copy_(torch.arange(24.0).view(2, 4, 3) + tag)
    bench.group.posted |= {10: torch.zeros(2, 4, 3), 11: torch.zeros(2, 4, 3)}
    return bench.group.posted[10], bench.group.posted[11]


SENDS = transfer(ActionKind.SEND, Payload.ACTIVATION, tag=10), transfer(ActionKind.SEND, Payload.GRADIENT, tag=11)


@pytest.mark.parametrize("forward", [compute(F), SplitAction(compute(F)), Pair(compute(F), compute(F, 1))], ids=str)
@pytest.mark.parametrize("backward", [
    (compute(B),), (SplitAction(compute(B)),), (compute(I), compute(W)), (SplitAction(compute(I)), compute(W)),
    (Pair(compute(B), compute(B, 1)),)], ids=lambda actions: ",".join(map(str, actions)))
def test_halves_send_what_a_whole_microbatch_sends(forward, backward):
    bench = Bench()
    activation, gradient = arriving(bench)
    before = () if isinstance(forward, Pair) else (compute(F, 1),)
    bench.run(*before, forward, SENDS[0], *backward, SENDS[1])
    rows = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(activation, rows + 1) and torch.equal(gradient, 2 * (rows + 1))
    assert not bench.work.parts and not bench.work.deferred
    mine = [name for name, sequences in bench.log if sequences]
    each = 1 + any(isinstance(action, SplitAction) for action in (forward, *backward))  # all of a microbatch's work, if any
    assert {name: mine.count(name) for name in mine} == dict.fromkeys(["F", "I1", "I2", "W1", "W2"], each)


def test_halves_alternate():
    bench = Bench()
    arriving(bench)
    bench.run(SplitAction(compute(F)), compute(B))
    assert [name for name, _ in bench.log] == ["F", "F", "I1", "W1", "I1", "W1", "I2", "W2", "I2", "W2"]
    assert all(sequences == 1 for _, sequences in bench.log)


@pytest.mark.parametrize("sequences, halves", [(0, [0, 0]), (1, [1, 0]), (2, [1, 1]), (3, [2, 1]), (7, [4, 3])])
def test_there_are_always_two_halves(sequences, halves):
    """Whatever the sizes on other ranks of the EP group: all of them run both halves, the larger first."""
    rows = torch.arange(sequences * 5).view(sequences, 5)
    tape = Microbatch(sequences, 4, rows, rows[:, 0], keep=False)
    parts = tape.halves()
    assert [part.sequences for part in parts] == halves and not any(part.keep for part in parts)
    assert torch.equal(torch.cat([part.tokens for part in parts]), rows)
    assert torch.equal(torch.cat([part.valid for part in parts]), rows[:, 0])
    assert Microbatch(sequences, 4).halves()[0].tokens is None


def test_a_slot_is_handed_what_another_slot_of_the_rank_has_made():
    """Slots 0 and 1 are the turn of a V: nothing is sent between them."""
    bench = Bench()
    arriving(bench)
    log, queue = bench.log, WeightGradients()
    bench.executor = Executor(1, 5, {slot: Stage(log, queue) for slot in (0, 1)}, queue, {1: 0})
    bench.tapes[1, 0] = Microbatch(2, 4, None, None, True)
    bench.group.posted[12] = returned = torch.zeros(2, 4, 3)
    after = Compute(F, 2, 1, 0)
    bench.links._posted[Payload.GRADIENT, 1, 0] = bench.links._posted.pop((Payload.GRADIENT, 0, 0))
    onward = Transfer(ActionKind.SEND, Payload.ACTIVATION, 2, 3, 1, 0, 12)
    bench.run(compute(F), after, onward, Compute(B, 2, 1, 0), compute(B), SENDS[1])
    rows = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(returned, rows + 2) and torch.equal(bench.group.posted[11], 4 * (rows + 1))
    assert bench.tapes[0, 0].output is None and bench.tapes[1, 0].input_gradient is None  # handed over is let go
    with pytest.raises(ActionFailed, match="slot 0 of this rank has made no activation"):
        bench.run(after)


def test_empty_microbatches_send_nothing():
    bench = Bench()
    bench.run(*(transfer(ActionKind.RECEIVE, payload, 1) for payload in Payload), compute(F, 1),
              transfer(ActionKind.SEND, Payload.ACTIVATION, 1), compute(B, 1),
              transfer(ActionKind.SEND, Payload.GRADIENT, 1), Reduce())
    assert bench.group.log == [] and bench.links.bytes_sent == 0
    assert [name for name, _ in bench.log] == ["F", "I1", "W1", "I2", "W2"]


def test_a_tensor_that_should_be_there_is_missed():
    """An empty microbatch is one whose size says so, never one whose tensor got lost."""
    with pytest.raises(ActionFailed, match="action F0.0: KeyError"):
        Bench().run(compute(F))
    with pytest.raises(ActionFailed, match="action SEND activation 0.0 to 2: ValueError"):
        Bench().run(transfer(ActionKind.SEND, Payload.ACTIVATION))
