"""State that changes owners between two layouts, with ranks that come and go: all of it arrives, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from runtime import configured, form, meeting_place, on_all, same, state

from actors.comm.groups import Aborted, Generation
from actors.runtime.stage_builder import groups_of
from actors.state.checkpoint import BIAS, EXP_AVG, MASTER
from actors.state.generations import State
from actors.state.optimizer import Optimizer, shards_of
from actors.state.resharding import carry_over
from orchestrator.state import ownership, transfer


def train(host):
    """Two updates with made-up gradients, and biases that are not all alike."""
    for step in range(2):
        host.optimizer.zero_gradients()
        for name, weight in host.optimizer.weights.items():
            ramp = torch.linspace(-1, 1, weight.gradient.numel(), dtype=torch.float64)
            weight.gradient += ramp.view_as(weight.gradient) + len(name)
        host.optimizer.reduce(host._generation, host._world)
        host.optimizer.update(1e-2)
        host.optimizer.publish(host._generation)
    for layer, bias in host.biases.items():
        bias += layer + torch.arange(len(bias))


def owners(config, layout):
    return (ownership.buckets(config.model, layout, config.elastic.copies),
            ownership.gates(config.model, layout, config.layout.layers_per_stage))


def take_place(host, rank, config, old_layout, layout, came_from, place, published):
    """Become `rank` of the new layout; None: leave. Returns (bytes sent, bytes received, those of the plan, working weights)."""
    if rank is None:
        return None
    (old, old_gates), (new, new_gates) = owners(config, old_layout), owners(config, layout)
    experts, nodes = config.model.n_routed_experts, [found.node for found in layout.places]
    plan = transfer.plan(old, new, came_from, nodes, old_gates=old_gates, new_gates=new_gates, gate_values=experts,
                         number_bytes=8)
    address, prefix = place
    generation = Generation(2, rank, torch.device("cpu"), "127.0.0.1", 30)
    generation.create(dist.PrefixStore(prefix, host._meeting_place.at(address)), *groups_of(layout, new, "auto"))
    stays = came_from[rank] is not None
    former, biases = (host.optimizer, host.biases) if stays else (None, {})
    settings, exact, cpu = config.optimizer, torch.float64, torch.device("cpu")
    shards = shards_of(rank, new, settings, exact, cpu, former.shards if former else ())
    mine = {layer: biases[layer] if layer in biases else torch.zeros(experts, dtype=exact)
            for layer, hosts in new_gates.items() if rank in hosts}
    world = generation.group(tuple(range(layout.size)))
    carried = carry_over(plan, rank, world, former.shards if former else [], shards, biases, mine)
    host.optimizer = Optimizer(rank, new, settings, exact, cpu, shards, former)
    host._held.add(2, State(host._assignment, new, shards, mine, applied=2))
    host.optimizer.publish(generation, plan.fresh if published else ())
    host._assignment = replace(host._assignment, rank=rank, layout=layout)
    host._generation.close()
    host.authority.generation = generation
    return carried.sent, carried.received, plan.bytes_moved, {n: w.value.clone() for n, w in host.optimizer.weights.items()}


def change(ranks, old_name, name, came_from, *overrides, published=True):
    """(state before, state after, what every new rank answers)."""
    config, old_layout = configured(old_name, *overrides)
    _, layout = configured(name, *overrides)
    form(ranks, *configured("PP4"))  # every process has a place, also those that come later
    everybody = list(ranks._seats)
    form(ranks, config, old_layout)
    ranks._seats += [number for number in everybody if number not in ranks._seats]
    ranks.start("initialise", [()] * old_layout.size).results(60)
    on_all(ranks, train, old_layout.size)
    before = state(ranks, old_layout)
    free = iter(where for where in range(4) if where not in came_from)
    process = [next(free) if former is None else former for former in came_from]
    rank_of = {where: rank for rank, where in enumerate(process)}
    store = meeting_place()
    place = ("127.0.0.1", store.port), f"change-{store.add('changes', 1)}"
    answers = ranks.start("do", [(take_place, rank_of.get(where), config, old_layout, layout, came_from, place, published)
                                 for where in range(4)]).results(60)
    seen = [answers[where] for where in process]
    every = Spread(ranks, process)
    return before, state(every, layout), seen


class Spread:
    """Calls new ranks by the processes that they are in."""

    def __init__(self, ranks, process):
        self._ranks, self._process = ranks, process

    def start(self, method, arguments):
        calls = [(idle,)] * 4
        for where, values in zip(self._process, arguments):
            calls[where] = values
        self._pending = self._ranks.start(method, calls)
        return self

    def results(self, seconds):
        found = self._pending.results(seconds)
        return [found[where] for where in self._process]


def idle(host):
    pass


@pytest.mark.parametrize("old, new, came_from, overrides", [
    ("PP2xEP2", "PP4", [2, 0, 3, 1], []), ("PP4", "EP4", [0, 1, 2, 3], []), ("EP4", "two hops", [3, 2, 1, 0], []),
    ("PP2xEP2", "PP2", [1, 0], []),  # a node is gone
    ("PP2", "PP2xEP2", [0, None, None, 1], []), ("one rank", "EP4", [None, None, 0, None], []), ("EP4", "EP3", [0, 3, 2], []),
    ("PP2xDP2", "PP2xDP2", [0, 1, None, 3], ["schedule.kind=1f1b"])])
def test_all_of_it_arrives(ranks, old, new, came_from, overrides):
    before, after, answers = change(ranks, old, new, came_from, *overrides)
    assert same(before, after)
    assert any(key[1] == EXP_AVG and value.any() for key, value in before.items())
    assert any(key[1] == BIAS for key in before)
    assert sum(sent for sent, *_ in answers) == sum(received for _, received, *_ in answers) > 0
    messages_begin = sum(sent for sent, *_ in answers) - answers[0][2]
    assert 0 < messages_begin <= 8 * len(answers) ** 2  # one number each
    for *_, weights in answers:
        assert weights and all(torch.equal(value.flatten(), after[name, MASTER]) for name, value in weights.items())


@pytest.mark.parametrize("old, new, came_from, missing", [
    ("EP2xDP2", "one node", [2, 1], []), ("PP2xDP2", "PP2xDP2", [0, 1, None, 3], [2])])
def test_working_weights_that_are_there_stay(ranks, old, new, came_from, missing):
    """Without any publication: only a rank that is new has none."""
    _, after, answers = change(ranks, old, new, came_from, "schedule.kind=1f1b", "elastic.copies=2", published=False)
    for rank, (*_, weights) in enumerate(answers):
        right = [torch.equal(value.flatten(), after[name, MASTER]) for name, value in weights.items()]
        assert right and (not any(right) if rank in missing else all(right))


def block(host, plan_of):
    """Wait for a peer that sends nothing."""
    config, layout = plan_of
    old, new = owners(config, layout)[0], ownership.buckets(config.model, layout, 0)
    swapped = tuple(replace(bucket, holders=tuple(1 - r for r in bucket.holders), members=tuple(1 - r for r in bucket.members),
                            owners=tuple(tuple(1 - r for r in of_shard) for of_shard in bucket.owners)) for bucket in new)
    plan = transfer.plan([replace(bucket, owners=tuple(of[:1] for of in bucket.owners)) for bucket in old], swapped, [0, 1], "xy")
    former = host.optimizer.shards
    masters = [owned.master.clone() for owned in former]
    shards = shards_of(0, swapped, config.optimizer, torch.float64, torch.device("cpu"), former)
    try:
        carry_over(plan, 0, host._world, former, shards, {}, {})
    except Aborted:
        return all(torch.equal(owned.master, master) for owned, master in zip(former, masters))
    return "not aborted"


def test_a_blocked_move_is_aborted(ranks):
    """And what the rank had is as it was."""
    config, layout = configured("one node", "elastic.copies=0")
    form(ranks, config, layout)
    ranks.start("initialise", [()] * 2).results(60)
    waiting = ranks.start("do", [(block, (config, layout))])
    assert not waiting.done()
    ranks.abort()
    assert waiting.results(10) == [True]
