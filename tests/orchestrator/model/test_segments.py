"""What a stage is planned to take. That the segments are the real ones is tested beside the real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.run_config import ModelConfig, load, parse
from orchestrator.model.segments import LayerCosts, stage_operations
from orchestrator.plan.cost import flops_per_token
from orchestrator.plan.scheduling import durations_of_run, operations_of_stages, programs_for, schedule_of
from orchestrator.schedule.ir.operations import timed
from orchestrator.schedule.ir.orders import forms, streams_of
from orchestrator.schedule.ir.spans import Lane
from orchestrator.schedule.timing.simulate import simulate

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"
COSTS = LayerCosts(forward=4.0, backward_input=6.0, backward_weight=5.0, dispatch=1.0, combine=2.0)
MODEL = ModelConfig(num_hidden_layers=4, first_k_dense_replace=1)


def stage(model=MODEL, layers=range(2, 3), first=False, last=False):
    return stage_operations(model, layers, first=first, last=last, length=128, costs=COSTS)


def total(operations, lane):
    return sum(operation.duration for operation in operations if operation.lane is lane)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_layer_with_experts_takes_what_it_is_said_to(shared):
    found = stage(MODEL.model_copy(update={"n_shared_experts": shared}))
    for operations, compute in ((found.forward, 4.0), (found.backward, 6.0)):
        assert total(operations, Lane.COMPUTE) == pytest.approx(compute) and total(operations, Lane.EXCHANGE) == 3.0
    assert sum(operation.weights or 0.0 for operation in found.backward) == pytest.approx(5.0)
    assert all((operation.weights is not None) == (operation.lane is Lane.COMPUTE) for operation in found.backward)
    assert not any(operation.weights for operation in found.forward)
    sent = {operation.name: operation.duration for operation in found.backward if operation.lane is Lane.EXCHANGE}
    assert sent == {"combine": 1.0, "dispatch": 2.0}        # the gradient of combine is sent like a dispatch


def test_operations_are_as_long_as_their_products():
    """All layers and the head in one stage, in multiplications a token: those of the published count of the whole model."""
    model = MODEL.model_copy(update={"num_nextn_predict_layers": 0})
    found = stage(model, range(4), first=True, last=True)
    one_mlp = 3 * model.hidden_size * model.intermediate_size
    scale = one_mlp / next(operation.duration for operation in found.forward if operation.name == "mlp")
    assert 6 * scale * total(found.forward, Lane.COMPUTE) == pytest.approx(flops_per_token(model, 128), rel=0.01)  # but for norms


def test_a_dense_model_has_nothing_to_exchange():
    found = stage(MODEL.model_copy(update={"first_k_dense_replace": 4, "num_nextn_predict_layers": 0}))
    assert total(found.forward, Lane.COMPUTE) == pytest.approx(4.0) and not total(found.backward, Lane.EXCHANGE)


def test_costs_of_a_position_are_those_of_its_layers():
    """Two positions of two stages with a layer each; the first layer is dense."""
    config = parse({}, ["schedule.kind=dualpipev", "schedule.costs={forward: 8, dispatch: 4, combine: 2}"])
    stages = operations_of_stages(config, config.stages)
    assert len(stages) == 4
    for found in stages[1:3]:
        assert total(found.forward, Lane.COMPUTE) == pytest.approx(4.0) and total(found.forward, Lane.EXCHANGE) == 3.0
    assert not total(stages[0].forward, Lane.EXCHANGE) and total(stages[3].forward, Lane.EXCHANGE) == 6.0  # with MTP's layer


@pytest.mark.parametrize("kind, microbatches", [("dualpipe", 8), ("zbv", 4), ("dualpipev", 4)])
def test_the_simulator_runs_the_programs_orders(kind, microbatches):
    """What an action does in a simulated timeline is what one thread does that issues in the order of the rank's program."""
    config = parse({}, [f"schedule.kind={kind}", "model.num_hidden_layers=6"])
    durations, stages = durations_of_run(config, config.stages), operations_of_stages(config, config.stages)
    timeline = simulate(schedule_of(config, config.stages, microbatches, training=True), durations)
    for position, program in enumerate(programs_for(config, config.stages, microbatches, training=True)):
        orders, lanes = dict(program.orders), list(timeline.lanes[position])
        for span, (_, form) in zip(timeline.rows[position], forms(program.actions), strict=True):
            template = timed(streams_of(form, stages, config.stages.hosted(position)), orders[form])
            simulated = [lanes.pop(0) for _ in template.spans]
            assert [(s.lane, s.start - span.start, s.end - span.start) for s in simulated] == [
                (lane, pytest.approx(start), pytest.approx(end)) for lane, start, end in template.spans]
        assert not lanes


@pytest.mark.parametrize("slow", [{"slowdown": 3.0}, {"exchange_slowdown": 5.0}, {"slowdown": 3.0, "exchange_slowdown": 5.0}])
def test_a_slow_position_is_slower_in_the_same_order(slow):
    config = parse({}, ["schedule.kind=1f1b"])
    durations = durations_of_run(config, config.stages)
    action = schedule_of(config, config.stages, 2, training=True).rows[1][1]
    slowed = replace(durations, **{name: (1.0, factor) for name, factor in slow.items()})
    usual, other = (given.template(action, 1) for given in (durations, slowed))
    for lane, name in ((Lane.COMPUTE, "slowdown"), (Lane.EXCHANGE, "exchange_slowdown")):
        lengths = [[end - start for found, start, end in template.spans if found is lane] for template in (usual, other)]
        assert lengths[0] and lengths[1] == pytest.approx([slow.get(name, 1.0) * length for length in lengths[0]])
    assert slowed.template(action, 0) == usual


@pytest.mark.parametrize("path", ["deepseek_v3", "moe_16b", "tiny"])
@pytest.mark.parametrize("training", [False, True])
def test_programs_of_real_sizes_have_orders(path, training):
    config = load(str(CONFIGS / f"{path}.yaml"))
    for program in programs_for(config, config.stages, 2 * config.layout.pipeline, training=training):
        assert program.orders
