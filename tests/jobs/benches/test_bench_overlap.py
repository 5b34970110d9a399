"""The overlap bench in small: two nodes of two ranks, short holds. How fast it is does not matter here; that it measures does.

Needs root, like the namespaces that it makes.
"""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from actors.comm.exchange import ExpertExchange
from actors.hosts.seated_answers import RankFailed
from actors.model.segment import Lane
from actors.model.weights import WeightGradients
from jobs.benches.overlap import bench as overlap
from jobs.benches.overlap.bench import Settings
from jobs.benches.overlap.cluster import Alone, ClusterShape, TokenPayload
from jobs.benches.overlap.compare import OverlapCase, compare, expected_bytes, verdicts
from jobs.benches.overlap.figures import shares
from jobs.benches.overlap.held import LaneRecord, LayeredChunk, Seconds, Tape, Tokens
from jobs.benches.overlap.plan import durations_of, task_of
from jobs.benches.shared.held_lane import HeldLane
from orchestrator.config.run_config import ConfigError, RunConfig, parse
from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair
from orchestrator.schedule.ir.operations import timed
from orchestrator.schedule.ir.orders import StageOperations, forms, streams_of
from orchestrator.schedule.ir.spans import Span
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.durations import Durations

NAME, HOLD, LAYERS, MICROBATCHES = "PP2xEP2", 0.003, 2, 6
CONTESTANTS = ("compute only", "dualpipe", "searched", "overlap off", "ScheduleDualPipeV")
COMMUNICATING = CONTESTANTS[1:]


def settings(**changes) -> Settings:
    small = {"shapes": [NAME], "nodes": 2, "milliseconds": [1000 * HOLD], "layers": LAYERS, "microbatches": MICROBATCHES // 2,
             "repeats": 1, "alone": 15, "effort": 20_000, "slow_repeats": 1, "tiny_steps": 1}
    return Settings(**(small | changes))


# --- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return overlap.run(parse({}, ["training.batch_sequences=8"]), settings())


@pytest.fixture(scope="module")
def contestants(found):
    return found["results"][NAME]["contestants"]


def test_every_contestant_is_measured(contestants):
    assert tuple(contestants) == CONTESTANTS and all(len(entry["seconds"]) == 1 for entry in contestants.values())


def test_nothing_is_faster_than_its_compute(contestants):
    """A position holds its lane six times for each layer of each microbatch."""
    assert all(entry["min"] >= 6 * LAYERS * MICROBATCHES * HOLD for entry in contestants.values())


def test_without_overlap_all_communication_is_exposed_and_with_it_less(contestants):
    for name in ("overlap off", "ScheduleDualPipeV"):
        exposed = contestants[name]["exposed"]
        assert exposed["step_seconds"] == pytest.approx(exposed["communication_seconds"]) and exposed["step_seconds"] > 0
    for name in ("dualpipe", "searched"):
        exposed = contestants[name]["exposed"]
        assert exposed["step_seconds"] < 0.8 * exposed["communication_seconds"]
        assert exposed["pairs"] < contestants["overlap off"]["exposed"]["pairs"]
    assert contestants["compute only"]["exposed"]["communication_seconds"] == pytest.approx(0, abs=1e-3)


def test_the_kernel_counts_the_rows_of_every_token(found, contestants):
    """Four exchanges a layer, each of which takes every token once to the other node and nowhere else."""
    calibration = found["results"][NAME]["calibration"]
    rows = 4 * LAYERS * MICROBATCHES * calibration["tokens"] * calibration["hidden"] * 4
    for name in COMMUNICATING:
        entry = contestants[name]
        assert entry["bytes"]["rows"] == rows and entry["exchanges_of_a_rank"] == 4 * LAYERS * MICROBATCHES
        assert found["checks"][f"{NAME}: {name} sends the rows of its tokens, and little else"]
        assert rows <= min(entry["bytes"]["sent"]) and min(entry["bytes"]["received"]) >= rows
    assert max(contestants["compute only"]["bytes"]["sent"]) < rows / 20


def test_predictions_are_simulations_of_what_was_measured_alone(contestants):
    for name in ("compute only", "dualpipe", "searched", "overlap off"):
        entry = contestants[name]
        assert entry["predicted"] >= 6 * LAYERS * MICROBATCHES * HOLD
        assert entry["measured/predicted"] == entry["median"] / entry["predicted"]
    assert contestants["dualpipe"]["predicted"] < contestants["overlap off"]["predicted"]
    assert "predicted" not in contestants["ScheduleDualPipeV"]


def test_ratios_are_of_medians(found, contestants):
    median = {name: statistics.median(entry["seconds"]) for name, entry in contestants.items()}
    best = min(("dualpipe", "searched"), key=median.__getitem__)
    assert found["ratio"][NAME] == {f"overlap off/{best}": median["overlap off"] / median[best],
                                    f"ScheduleDualPipeV/{best}": median["ScheduleDualPipeV"] / median[best],
                                    "dualpipe/searched": median["dualpipe"] / median["searched"]}


def test_a_slow_link_slows_the_exchanges_of_its_position_only(found):
    slow, before = (found["results"][NAME][key]["exchange_seconds"] for key in ("slow_link", "calibration"))
    times = [sum(now.values()) / sum(then.values()) for now, then in zip(slow, before, strict=True)]
    assert times[0] > 4 and times[1] < 2
    assert set(found["results"][NAME]["slow_link"]["contestants"]) == {"dualpipe", "dualpipev", "searched"}


def test_the_real_model_has_the_same_losses_both_ways(found):
    model = found["tiny"]
    assert model["same_losses"] and all(len(taken) >= 1 for taken in model["seconds"].values())
    assert max(figure["overlap_ratio"] for figure in model["figures"]["in turn"]) < 0.01
    assert min(figure["overlap_ratio"] for figure in model["figures"]["overlap"]) > 0.01


@pytest.mark.long
def test_a_rank_that_does_other_work_is_found(monkeypatch):
    """Position 1 has a layer less than its neighbour thinks."""
    right = overlap.task_of
    monkeypatch.setattr(overlap, "task_of", lambda each, position, layers: (
        replace(right(each, position, layers), layers=layers - position, program=replace(
            right(each, position, layers).program, orders=()))))
    with pytest.raises((RuntimeError, RankFailed), match="other numbers|did other work|TorchDualPipeV"):
        overlap.run(RunConfig(), settings(slow_repeats=0, tiny_steps=0))


# --- its parts ---------------------------------------------------------------------------------------------------------


class Lying:
    """An exchange of one rank with itself, one of whose calls is wrong."""

    def __init__(self, wrong: str = ""):
        self._true, self._wrong = ExpertExchange(None, torch.arange(1), [1]), wrong

    def __getattr__(self, name):
        def call(*arguments):
            result = getattr(self._true, name)(*arguments)
            if name == self._wrong:
                first = result[0] if isinstance(result, tuple) else getattr(result, "rows", result)
                first[0, 1] += 1
            return result
        return call


def tokens(wrong: str = "") -> Tokens:
    return Tokens(Lying(wrong), member=0, members=1, count=4, hidden=6)


@pytest.mark.parametrize("wrong", ["dispatch", "combine", "combine_backward", "dispatch_backward"])
def test_wrong_numbers_are_found_where_they_arrive(wrong):
    through(tokens(), layers=1)
    with pytest.raises(RuntimeError, match=f"^{wrong}: other numbers"):
        through(tokens(wrong), layers=1)


def through(sent: Tokens, layers: int, stages: int = 1) -> tuple[LaneRecord, Tape]:
    """A microbatch forward and backward through stages of one rank, one after the other."""
    journal, lane, queue = LaneRecord(), HeldLane(), WeightGradients()
    lane.reset(0.0)
    chunks = [LayeredChunk(lane, queue, sent, journal, Seconds(1.0, 1.0, 1.0), slot=stage, layers=layers, entered=stage * layers,
                           total=stages * layers) for stage in range(stages)]
    tapes = [Tape(1, sent.count, number=3) for _ in chunks]
    for chunk, tape, after in zip(chunks, tapes, [*tapes[1:], None]):
        for segment in chunk.forward(tape):
            segment.run()
        if after is not None:
            after.input = tape.output
    for chunk, tape, after in zip(chunks[::-1], tapes[::-1], [*tapes[-2::-1], None]):
        for segment in chunk.backward(tape):
            segment.run()
        queue.flush()
        if after is not None:
            after.output_gradient = tape.input_gradient
    return journal, tapes[0]


def test_a_stage_holds_and_communicates_for_every_layer():
    journal, tape = through(tokens(), layers=2, stages=2)
    assert len(journal.holds) == 2 * 2 * 6 and len(journal.exchanges) == 2 * 2 * 4
    assert journal.exchanges[:3] == [("dispatch", 0, 3, 0), ("combine", 0, 3, 0), ("dispatch", 0, 3, 1)]
    assert journal.exchanges[-2:] == [("combine_backward", 0, 3, 0), ("dispatch_backward", 0, 3, 0)]
    assert tape.hidden is None and tape.gradient is None and not tape.handles


def test_tokens_need_a_power_of_two():
    with pytest.raises(ValueError, match="3 members"):
        Tokens(Lying(), member=0, members=3, count=4, hidden=6)


def test_shares_of_a_pair_leave_out_what_is_around_it():
    forward, backward = Compute(ActionKind.FORWARD, 0, 0, 2), Compute(ActionKind.BACKWARD, 1, 1, 0)
    spans = [Span(0, Lane.EXCHANGE, "F0.9 dispatch 0", 0.0, 5.0), Span(0, Lane.COMPUTE, "F0.2 attention 0", 10.0, 12.0),
             Span(0, Lane.EXCHANGE, "B1.0 combine 3", 10.0, 13.0), Span(0, Lane.COMPUTE, "B1.0", 14.0, 18.0),
             Span(0, Lane.PIPELINE, "F0.2", 8.0, 10.0)]
    found = shares(spans, [Pair(forward, backward)], 0.0, 20.0)
    assert found.pair_seconds == 8.0 and found.pairs.exposed_communication_seconds == 1.0
    assert found.pairs.bubble_ratio == pytest.approx(1 / 8) and found.step.exposed_communication_seconds == 6.0
    assert shares(spans, [Pair(forward, replace(backward, kind=ActionKind.BACKWARD_INPUT))], 0.0, 20.0).pairs is None


def alone(dispatch: tuple[float, float]) -> Alone:
    exchange = tuple({"dispatch": d, "combine": 2.0, "combine_backward": d, "dispatch_backward": 2.0} for d in dispatch)
    return Alone(hold=1.0, hold_jitter=0.0, exchange=exchange, blocking=1.0, hop=0.5)


def test_durations_are_of_a_position():
    even, uneven = durations_of(alone((3.0, 3.3)), layers=4), durations_of(alone((3.0, 30.0)), layers=4)
    assert (even.forward, even.backward_weight, even.hop) == (8.0, 8.0, 0.5)
    assert even.dispatch == pytest.approx(4 * 3.15) and even.combine == 8.0
    assert even.exchange_slowdown == ()
    assert (uneven.dispatch, uneven.combine) == (12.0, 8.0) and uneven.exchange_slowdown == (1.0, 32 / 5)


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_programs_are_in_the_order_that_is_predicted(kind):
    """Where one position communicates slowly, its order is another, and takes as long as the simulation says."""
    durations = Durations(8.0, 8.0, 8.0, dispatch=4.0, combine=3.0, layers=4, exchange_slowdown=(10.0, 1.0))
    contestant = OverlapCase(generate(kind, 2, 8), durations)
    stages, staged = contestant.schedule.stages, contestant.predicted.durations
    orders = []
    for position in range(2):
        program, (_, slow) = task_of(contestant, position, 4).program, staged.factors(position)
        operations = [StageOperations(*(tuple(operation.scaled(1.0, slow) for operation in way) for way in (
            staged.operations(stage).forward, staged.operations(stage).backward))) for stage in range(stages.count)]
        orders.append(dict(program.orders))
        for action, form in forms(program.actions):
            template = timed(streams_of(form, operations, stages.hosted(position)), orders[-1][form])
            assert template.duration == pytest.approx(staged.of(action, position))
    assert any(orders[0][form] != orders[1][form] for form in orders[0].keys() & orders[1])


@pytest.mark.parametrize("width, peer, copies", [(1, False, 3), (1, True, 3), (2, False, 3), (2, True, 6)])
def test_tokens_cross_once_to_a_node_and_the_peers_to_each_rank(width, peer, copies):
    shape = ClusterShape(nodes=4, pipeline=2, width=width)
    assert expected_bytes(shape, TokenPayload(count=8, hidden=10), layers=3, peer=peer) == 4 * 3 * copies * 8 * 10 * 4


def measured(seconds: float, sent: int = 1000, exposed: float = 0.0):
    figure = SimpleNamespace(exposed_communication_seconds=exposed, communication_seconds=1.0, compute_seconds=1.0 - exposed,
                             bubble_ratio=0.0)
    step = SimpleNamespace(late=0.0, exchanges=0, shares=SimpleNamespace(step=figure, pairs=figure, pair_seconds=1.0))
    return SimpleNamespace(seconds=seconds, steps=[step], sent=[sent], received=[sent])


def judged(**changes) -> dict[str, bool]:
    """Verdicts on contestants that pass, but for what is changed."""
    schedule = generate("dualpipe", 2, 4)
    contestants = {"dualpipe": OverlapCase(schedule, Durations(1.0, 1.0, 1.0))}
    predicted = contestants["dualpipe"].predicted.makespan
    contestants |= {"searched": OverlapCase(schedule, Durations(0.9, 0.9, 0.9)),
                    "overlap off": OverlapCase(None, Durations(1.0, 1.0, 1.0)),
                    "ScheduleDualPipeV": OverlapCase(None, Durations(1.0, 1.0, 1.0))}
    seconds = {"dualpipe": predicted, "searched": 0.9 * predicted, "overlap off": 1.4 * predicted,
               "ScheduleDualPipeV": 1.4 * predicted}
    steps = {name: [measured(taken)] for name, taken in seconds.items()}
    for name, values in changes.items():
        steps[name] = [measured(values.pop("times", 1.0) * seconds[name], **values)]
    return verdicts("x", compare(contestants, steps, dict.fromkeys(steps, 1000), members=2))


@pytest.mark.parametrize("changes, missed", [
    ({}, None),
    ({"dualpipe": {"sent": 999}}, "x: dualpipe sends the rows of its tokens, and little else"),
    ({"searched": {"sent": 10 ** 6}}, "x: searched sends the rows of its tokens, and little else"),
    ({"dualpipe": {"exposed": 0.04}}, "x: dualpipe exposes at most 0.033 of its steady pairs"),
    ({"overlap off": {"times": 0.95}}, "x: overlap off takes 1.5 times as long as our best"),
    ({"ScheduleDualPipeV": {"times": 0.95}}, "x: ScheduleDualPipeV takes 1.5 times as long as our best"),
    ({"dualpipe": {"times": 1.04}}, "x: dualpipe is predicted within 0.03"),
    ({"searched": {"times": 0.96}}, "x: searched is predicted within 0.03"),
])
def test_verdicts(changes, missed):
    checks = judged(**changes)
    assert {name for name, holds in checks.items() if not holds} == ({missed} if missed else set())


def test_searched_must_win():
    checks = judged(searched={"times": 1.2})
    assert not checks["x: searched is faster than dualpipe"]


def test_without_overlap_communication_is_predicted_in_full():
    schedule, durations = generate("dualpipe", 2, 4), Durations(8.0, 8.0, 8.0, dispatch=2.0, combine=3.0)
    off = OverlapCase(schedule, durations, overlap=False).predicted.makespan
    longer = OverlapCase(schedule, Durations(13.0, 13.0, 8.0)).predicted.makespan
    assert math.isclose(off, longer) and off > OverlapCase(schedule, durations).predicted.makespan


@pytest.mark.parametrize("arguments, line", [
    (["shapes=[PP3xEP4]"], "shapes = PP3xEP4: PP<even>xEP<a power of two, and a multiple of nodes = 4>"),
    (["shapes=[PP2xEP6]"], "shapes = PP2xEP6: PP<even>xEP<a power of two, and a multiple of nodes = 4>"),
    (["milliseconds=[1.0]"], "milliseconds = [1.0]: a number above 0 for each of 3 shapes"),
    (["milliseconds=[5, 5, 0]"], "milliseconds = [5.0, 5.0, 0.0]: a number above 0 for each of 3 shapes"),
])
def test_options_are_refused_in_one_line(bench, arguments, line):
    code, out, err = bench("overlap", *(word for text in arguments for word in ("--option", text)))
    assert code == 2 and err.startswith(line) and err.count("\n") == 1 and not out


def test_without_root_it_is_refused(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="network namespaces need root"):
        overlap.run(RunConfig(), settings())
