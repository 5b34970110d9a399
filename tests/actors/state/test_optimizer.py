"""ZeRO-1 over rank processes against torch.optim.AdamW on all weights in this one."""

from __future__ import annotations

import pytest
import torch
from runtime import configured, form, on_all, same, state

from actors.state.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER
from orchestrator.model.parameters import stage_parameters

STEPS, RATES = 5, [1e-2, 7e-3, 3e-2, 1e-3, 5e-3]


def contribution(name, shape, step, rank):
    """What one rank's backward leaves; steps 1 and 3 are small, so that clipping bites in the others only."""
    generator = torch.Generator().manual_seed(abs(hash_of(name)) + 1000 * step + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * (1e-4 if step % 2 else 1.0)


def hash_of(name):
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) % 100_000


def begin(ranks, name, *overrides):
    """A generation in its initial state."""
    config, layout = configured(name, *overrides)
    form(ranks, config, layout)
    ranks.start("initialise", [()] * layout.size).results(60)
    return config, layout


def optimise(host, step):
    """One step with made-up gradients; (norm, names held)."""
    optimizer, rank = host.optimizer, host._assignment.rank
    optimizer.zero_gradients()
    for name, weight in optimizer.weights.items():
        weight.gradient += contribution(name, weight.gradient.shape, step, rank)
    optimizer.reduce(host._generation, host._world)
    optimizer.update(RATES[step])
    optimizer.publish(host._generation)
    return optimizer.gradient_norm, list(optimizer.weights)


def working(host):
    return {name: weight.value.clone() for name, weight in host.optimizer.weights.items()}


def all_weights(model):
    return {spec.name: spec for spec in stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)}


@pytest.mark.parametrize("name, moments", [("PP2xEP2", "exact"), ("PP2xDP2", "exact"), ("EP4", "exact"), ("one rank", "exact"),
                                           ("PP2xEP2", "bf16")])
def test_the_same_numbers_as_adamw_on_one_process(ranks, name, moments):
    """bf16: as AdamW whose moments are rounded after each of its steps."""
    config, layout = begin(ranks, name, "optimizer.weight_decay=0.3", f"optimizer.moments={moments}")
    initial = state(ranks, layout)
    specs = all_weights(config.model)
    assert {weight for weight, _ in initial} - {str(layer) for layer in range(9)} == specs.keys()
    weights = {key: torch.nn.Parameter(initial[key, MASTER].view(spec.shape).clone()) for key, spec in specs.items()}
    norms = [p for key, p in weights.items() if key.endswith("norm.weight")]
    matrices = [p for key, p in weights.items() if not key.endswith("norm.weight")]
    settings = config.optimizer
    adam = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0.0}], lr=1.0, weight_decay=0.3,
                             betas=(settings.beta1, settings.beta2), eps=settings.epsilon, foreach=False)
    assert len(norms) == sum(len(spec.shape) == 1 for spec in specs.values()) > 10
    for step in range(STEPS):
        answers = on_all(ranks, optimise, layout.size, step)
        for key, parameter in weights.items():
            holders = [rank for rank, (_, held) in enumerate(answers) if key in held]
            parameter.grad = sum(contribution(key, parameter.shape, step, rank) for rank in holders)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), settings.clip_norm)
        assert [answer[0] for answer in answers] == pytest.approx([float(norm)] * layout.size, rel=1e-12)
        assert len({answer[0] for answer in answers}) == 1
        for group in adam.param_groups:
            group["lr"] = RATES[step]
        adam.step()
        for held in adam.state.values() if moments == "bf16" else ():
            held |= {kind: held[kind].bfloat16().double() for kind in (EXP_AVG, EXP_AVG_SQ)}
    final = state(ranks, layout)  # and all owners of a shard hold the same bits
    for key, parameter in weights.items():
        moments = adam.state[parameter]
        for kind, expected in ((MASTER, parameter.detach()), (EXP_AVG, moments["exp_avg"]), (EXP_AVG_SQ, moments["exp_avg_sq"])):
            assert final[key, kind] == pytest.approx(expected.flatten(), abs=1e-12), (key, kind)


def count_owners(host):
    return [(owned.bucket.index, owned.shard) for owned in host.optimizer.shards]


def test_every_shard_has_a_second_owner_on_another_node(ranks):
    _, layout = begin(ranks, "PP2xEP2")
    owners = {}
    for place, shards in zip(layout.places, on_all(ranks, count_owners, layout.size)):
        for shard in shards:
            owners.setdefault(shard, []).append(place.node)
    assert owners and all(len(nodes) == len(set(nodes)) == 2 for nodes in owners.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_working_weights_are_the_masters_rounded(ranks, dtype):
    config, layout = begin(ranks, "PP2xEP2", f"training.dtype={dtype}")
    before = state(ranks, layout)
    for step in range(2):
        on_all(ranks, optimise, layout.size, step)
    masters = state(ranks, layout)
    assert not same(before, masters)
    specs = all_weights(config.model)
    held = on_all(ranks, working, layout.size)
    assert set().union(*held) == specs.keys()
    for name, value in ((name, value) for of_rank in held for name, value in of_rank.items()):
        assert value.dtype == (torch.float32 if specs[name].precise else getattr(torch, dtype))
        assert torch.equal(value.flatten(), masters[name, MASTER].to(value.dtype))


def reduce_only(host):
    host.optimizer.zero_gradients()
    for weight in host.optimizer.weights.values():
        weight.gradient += 1
    host.optimizer.reduce(host._generation, host._world)


def test_reducing_changes_nothing_that_persists(ranks):
    _, layout = begin(ranks, "PP2xEP2")
    on_all(ranks, optimise, layout.size, 0)
    before, weights = state(ranks, layout), on_all(ranks, working, layout.size)
    on_all(ranks, reduce_only, layout.size)
    assert same(before, state(ranks, layout))
    assert all(same(a, b) for a, b in zip(weights, on_all(ranks, working, layout.size)))
