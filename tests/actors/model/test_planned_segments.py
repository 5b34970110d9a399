"""The segments that a stage has are those that were planned: same lanes, names, layers, and what waits for what."""

from __future__ import annotations

import pytest
import torch
from helpers import Pipeline, random_tokens, small_model

from actors.model.segment import Lane, Segment
from actors.model.tape import Microbatch
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import stage_layers
from orchestrator.model.segments import LayerCosts, stage_operations

MODELS = {
    "tiny": ModelConfig(),
    "two dense layers": small_model(first_k_dense_replace=2, num_hidden_layers=5),
    "no shared expert": small_model(n_shared_experts=0, first_k_dense_replace=1),
    "no multi-token prediction": small_model(num_nextn_predict_layers=0, first_k_dense_replace=0),
    "dense": small_model(num_nextn_predict_layers=0, first_k_dense_replace=3),
}
COSTS = LayerCosts(1.0, 1.0, 1.0, 1.0, 1.0)


def facts(segments):
    return [(segment.lane, segment.name, segment.layer, segment.after) for segment in segments]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_segments_are_those_that_were_planned(name, stages):
    model = MODELS[name]
    pipeline = Pipeline(model, torch.float32, stages=stages)
    for number, (chunk, layers) in enumerate(zip(pipeline.chunks, stage_layers(model, stages), strict=True)):
        planned = stage_operations(model, layers, first=number == 0, last=number == stages - 1, length=6, costs=COSTS)
        tape = Microbatch(sequences=0, length=6)
        assert facts(chunk.forward(tape)) == facts(planned.forward)
        assert facts(chunk.backward(tape)) == facts(planned.backward)


@pytest.mark.parametrize("name", MODELS)
def test_only_compute_of_a_backward_leaves_weight_gradients_and_where_work_was_planned_it_does(name):
    model = MODELS[name]
    pipeline = Pipeline(model)
    chunk, layers = pipeline.chunks[0], range(model.num_hidden_layers)
    planned = stage_operations(model, layers, first=True, last=True, length=6, costs=COSTS)
    tape = Microbatch(sequences=2, length=6, tokens=random_tokens(model, 2, 6))
    for segment in chunk.forward(tape):
        segment.run()
        assert not len(pipeline.queue)
    for segment, operation in zip(chunk.backward(tape), planned.backward, strict=True):
        segment.run()
        left = len(pipeline.queue.take())
        assert not left or segment.lane is Lane.COMPUTE
        assert left or not operation.weights


def test_what_need_not_wait_may_run_before_the_exchange_it_passes():
    """A segment with `after` = 2 gives the same when the exchange before it runs after it."""
    model = small_model()
    results = []
    for swapped in (False, True):
        pipeline = Pipeline(model)
        tape = Microbatch(sequences=2, length=6, tokens=random_tokens(model, 2, 6))
        for segments in (pipeline.chunks[0].forward, pipeline.chunks[0].backward):
            for segment in swap(segments(tape)) if swapped else segments(tape):
                segment.run()
        pipeline.queue.flush()
        results.append([tape.loss_sum, *pipeline.gradients().values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def swap(segments: list[Segment]) -> list[Segment]:
    order = list(segments)
    for place, segment in enumerate(segments):
        if segment.name == "shared":
            assert segment.after == 2 and order[place - 1].lane is Lane.EXCHANGE
            order[place - 1], order[place] = segment, order[place - 1]
    assert order != list(segments)
    return order
