"""The executor and its links, with stages that only note what happened."""

from __future__ import annotations

from enum import StrEnum

import pytest
import torch

from actors import executor as executor_module
from actors.comm.links import Links
from actors.executor import ActionFailed, Executor, StepWork
from actors.model.chunk import Lane, Microbatch, Segment
from actors.model.weights import WeightGradients
from orchestrator.schedule.actions import Compute, Kind, Pair, Payload, Program, Reduce, Transfer

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT


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

    def __init__(self, reduce=lambda: None):
        self.log, self.group = [], Loop()
        queue = WeightGradients()
        self.executor = Executor(1, 5, {0: Stage(self.log, queue)}, queue)
        self.tapes = {(0, n): Microbatch(count, 4, None, None, True) for n, count in enumerate((2, 0))}
        self.links = Links(self.group, torch.float32, torch.device("cpu"), lambda slot, n: (2, 4, 3) if n == 0 else None)
        self.work = StepWork(self.tapes, self.links, reduce)

    def run(self, *actions):
        self.executor.run(Program(3, 2, actions), self.work)


def compute(kind, microbatch=0):
    return Compute(kind, 1, 0, microbatch)


def transfer(kind, payload, microbatch=0, tag=8):
    return Transfer(kind, payload, 2, 1, 0, microbatch, tag)


def test_a_kind_without_a_handler_is_refused_when_the_rank_starts(monkeypatch):
    monkeypatch.setattr(executor_module, "Kind", StrEnum("Kind", {**{kind.name: kind.value for kind in Kind}, "PREFETCH": "P"}))
    with pytest.raises(ValueError, match="no handler for .*PREFETCH"):
        Executor(0, 1, {}, WeightGradients())


@pytest.mark.parametrize("broken, position_in_program", [("F", 1), ("reduce", 2)])
def test_a_failure_names_where_it_happened(broken, position_in_program):
    def fail():
        raise RuntimeError("connection closed by peer")

    bench = Bench(reduce=fail)
    actions = [transfer(Kind.RECEIVE, Payload.ACTIVATION), compute(F), Reduce()]
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
        transfer(Kind.RECEIVE, Payload.ACTIVATION, tag=0), transfer(Kind.RECEIVE, Payload.GRADIENT, tag=1))
    bench.group.posted[0].fill_(4)
    bench.group.posted[1].fill_(8)
    arrived, gradient = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    bench.group.posted |= {10: arrived, 11: gradient}
    bench.run(compute(F), transfer(Kind.SEND, Payload.ACTIVATION, tag=10), compute(B),
              transfer(Kind.SEND, Payload.GRADIENT, tag=11))
    assert torch.equal(arrived, torch.full((2, 4, 3), 5.0)) and torch.equal(gradient, torch.full((2, 4, 3), 16.0))
    assert bench.links.bytes_sent == 2 * arrived.numel() * 4
    assert bench.tapes[0, 0].output is None and bench.tapes[0, 0].input_gradient is None  # sent is let go
    assert [name for name, _ in bench.log] == ["F", "I1", "W1", "I2", "W2"]  # B: weights right after each part
    lanes = [span.lane for span in bench.work.spans]
    assert lanes.count("pipeline") == 2 and lanes.count("compute") == 5


def test_weight_gradients_wait_for_their_own_action():
    bench = Bench()
    receives = [transfer(Kind.RECEIVE, payload, tag=tag) for tag, payload in enumerate(Payload)]
    bench.run(*receives, compute(F), compute(I), compute(F, 1), compute(I, 1), compute(W, 1), compute(W))
    assert bench.log == [("F", 2), ("I1", 2), ("I2", 2), ("F", 0), ("I1", 0), ("I2", 0),
                         ("W1", 0), ("W2", 0), ("W1", 2), ("W2", 2)]
    assert not bench.work.deferred


def test_a_pair_runs_both_halves():
    bench = Bench()
    bench.run(transfer(Kind.RECEIVE, Payload.GRADIENT), Pair(compute(F, 1), compute(B)))
    assert bench.log == [("F", 0), ("I1", 2), ("W1", 2), ("I2", 2), ("W2", 2)]


def test_empty_microbatches_send_nothing():
    bench = Bench()
    bench.run(*(transfer(Kind.RECEIVE, payload, 1) for payload in Payload), compute(F, 1),
              transfer(Kind.SEND, Payload.ACTIVATION, 1), compute(B, 1), transfer(Kind.SEND, Payload.GRADIENT, 1), Reduce())
    assert bench.group.log == [] and bench.links.bytes_sent == 0
    assert [name for name, _ in bench.log] == ["F", "I1", "W1", "I2", "W2"]


def test_a_tensor_that_should_be_there_is_missed():
    """An empty microbatch is one whose size says so, never one whose tensor got lost."""
    with pytest.raises(ActionFailed, match="action F0.0: KeyError"):
        Bench().run(compute(F))
    with pytest.raises(ActionFailed, match="action SEND activation 0.0 to 2: ValueError"):
        Bench().run(transfer(Kind.SEND, Payload.ACTIVATION))
