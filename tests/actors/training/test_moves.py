"""Experts that move in mid-run: the same curve as that of a run in which they stay."""

from __future__ import annotations

import shutil
import time
from functools import partial

import pytest
import runtime
import torch
from runtime import configured, furthest, on_all, placement_of, state, train

from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.runtime import rank as rank_module
from actors.state import resharding as state_module
from actors.state.checkpoint import EXP_AVG, EXP_AVG_SQ

STEPS = 8
MOVING = ["placement.every=2", "placement.least_gain=0.02"]
ENOUGH = [f"training.steps={STEPS}", "training.batch_sequences=16", "model.n_routed_experts=16", "model.n_group=8",
          "model.topk_group=4", "model.num_hidden_layers=2"]


def run(ranks, folder, name, *overrides, **more):
    """(run, state at the end). The gates' biases are skewed before the first step, so that some experts are chosen more."""
    config, layout = configured(name, *ENOUGH, *overrides)
    before = {0: partial(on_all, ranks, skew, layout.size)} | more.pop("before", {})
    found = train(ranks, folder, config, layout, before=before, **more)
    assert found.error is None, found.error
    return found, state(ranks, layout)


def skew(host):
    for layer, bias in host.biases.items():
        bias += torch.linspace(0, 0.2, len(bias), dtype=bias.dtype).roll(layer)


def ledger(folder):
    return RunFolder(str(folder), "run").ledger_lines()


@pytest.fixture(scope="module")
def reference(ranks, tmp_path_factory):
    """Eight steps in which no expert moves, by layout."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(ranks, tmp_path_factory.mktemp("reference"), name)
        return made[name]

    return get


def close(found, expected) -> bool:
    return torch.tensor(found.losses) == pytest.approx(torch.tensor(expected.losses), rel=1e-12)


@pytest.mark.parametrize("name, overrides", [
    ("PP2xEP2", []), ("EP4", []), ("two hops", []), ("EP2xDP2", ["elastic.copies=2"]),
    pytest.param("one node", [], marks=pytest.mark.long),
    pytest.param("PP2xEP2", ["schedule.overlap=false", "elastic.copies=0"], marks=pytest.mark.long),
    ("PP2xEP2", ["schedule.kind=zbv", "model.num_hidden_layers=4", "training.recompute=full", "elastic.copies=0"])])
def test_the_same_curve_as_without_moves(ranks, reference, tmp_path, name, overrides):
    """Moments too are the same at the end, on all owners."""
    still = run(ranks, tmp_path / "still", name, *overrides) if overrides else reference(name)
    found, at_the_end = run(ranks, tmp_path / "moved", name, *MOVING, *overrides)
    told = found.told("placement")
    assert told and all(event["experts"] > 0 and event["bytes"] > 0 for event in told)
    assert all(event["unevenness_after"] <= event["unevenness_before"] for event in told)
    assert close(found, still[0]) and furthest(at_the_end, still[1]) < 1e-12


@pytest.mark.long
def test_eight_ranks(tmp_path):
    """Two positions with mirrors, EP over four nodes."""
    config, layout = configured("PP2xEP4")
    with ProcessRanks(config, layout.size, runtime.host, start_method="forkserver") as own:
        still = run(own, tmp_path / "still", "PP2xEP4")
        found, at_the_end = run(own, tmp_path / "moved", "PP2xEP4", *MOVING)
    assert found.told("placement") and close(found, still[0]) and furthest(at_the_end, still[1]) < 1e-12


def lose_moments(shards):
    for owned in shards:
        if owned.steps:
            owned.set_moments(torch.zeros_like(owned.master), torch.zeros_like(owned.master), owned.steps)


def forget_updates(shards):
    for owned in shards:
        owned.set_moments(owned.moment(EXP_AVG), owned.moment(EXP_AVG_SQ), 1)


def careless(host, spoil):
    """After a move: `spoil(shards)`, of all that this rank owns."""

    def carry_over(plan, rank, world, former, shards, *biases):
        carried = state_module.carry_over(plan, rank, world, former, shards, *biases)
        spoil(shards)
        return carried

    rank_module.carry_over = carry_over


def careful(host):
    rank_module.carry_over = state_module.carry_over


@pytest.mark.parametrize("spoil", [lose_moments, forget_updates])
def test_moments_matter(ranks, reference, tmp_path, spoil):
    """The comparison above would see moments that were left behind, and a count of updates that was."""
    try:
        found, _ = run(ranks, tmp_path, "PP2xEP2", *MOVING, before={1: partial(on_all, ranks, careless, 4, spoil)})
    finally:
        on_all(ranks, careful, 4)
    until = found.told("placement")[0]["step"]
    expected = reference("PP2xEP2")[0]
    assert found.losses[:until] == expected.losses[:until] and not close(found, expected)


def fail(host):
    def carry_over(*arguments):
        raise ValueError("no such thing")

    rank_module.carry_over = carry_over


def test_a_move_that_fails_for_one_is_made_without_it(ranks, reference, tmp_path):
    """It does not take part: the others wait for what it has, and are set free. Nobody has lost what it had."""
    failing = {1: lambda: ranks.start("do", [(nothing,), (fail,)]).results(30)}
    started = time.monotonic()
    try:
        found, at_the_end = run(ranks, tmp_path, "PP2xEP2", *MOVING, "elastic.cool_down_seconds=0.2", before=failing)
    finally:
        runtime.forget(ranks)
        on_all(ranks, careful, 4)
    assert time.monotonic() - started < 60
    lost, = found.told("lost")
    assert lost["members"] == ["virtual-0/1"] and "no such thing" in lost["reasons"][0]
    expected, state_expected = reference("PP2xEP2")
    assert torch.tensor(found.losses) == pytest.approx(torch.tensor(expected.losses), rel=1e-10)
    assert furthest(at_the_end, state_expected) < 1e-10


def nothing(host):
    pass


@pytest.mark.parametrize("name, overrides", [("EP4", []), ("PP2", []), ("PP2xEP2", MOVING), ("one rank", [])])
def test_a_checkpoint_after_moves_is_read_by_any_layout(ranks, reference, moved_and_stopped, tmp_path, name, overrides):
    """Its weights are called the same wherever they were; experts begin in their usual places again."""
    shutil.copytree(moved_and_stopped, tmp_path, dirs_exist_ok=True)
    rest, at_the_end = run(ranks, tmp_path, name, *overrides)
    expected, state_expected = reference("PP2xEP2")
    assert [step["step"] for step in rest.steps] == [5, 6, 7]
    assert torch.tensor(rest.losses) == pytest.approx(torch.tensor(expected.losses[5:]), rel=1e-10)
    assert furthest(at_the_end, state_expected) < 1e-10


@pytest.fixture(scope="module")
def moved_and_stopped(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    stopped, _ = run(ranks, folder, "PP2xEP2", *MOVING, stop_after=5)
    assert stopped.outcome.interrupted and stopped.told("placement")
    return folder


def held(record, layout) -> dict:
    """(layer, expert) -> ranks, from a line of the ledger."""
    found = {}
    for entry in record:
        for rank, experts in zip(layout.expert_group(entry["replica"], entry["position"]), entry["experts"], strict=True):
            for expert in experts:
                found.setdefault((entry["layer"], expert), set()).add(rank)
    return found


def test_the_ledger_says_from_which_step_on_experts_are_where(ranks, tmp_path):
    """With the generation, the layout and the schedule: what it takes to run the same again."""
    config, layout = configured("PP2xEP2", *ENOUGH)
    found, _ = run(ranks, tmp_path, "PP2xEP2", *MOVING)
    lines, told = ledger(tmp_path), found.told("placement")
    changes = {line["step"]: line for line in lines if "placement" in line}
    assert list(changes) == [0, *(event["step"] for event in told)]
    assert all({"layout", "schedule"} <= line.keys() for line in changes.values())
    assert [line["generation"] for line in changes.values()] == [1, *(event["generation"] for event in told)]
    assert [event["generation"] for event in told] == list(range(2, 2 + len(told)))
    assert [line["generation"] for line in lines] == [step["generation"] for step in found.steps]
    places = [held(line["placement"], layout) for line in changes.values()]
    assert places[0] == {key: set(ranks) for key, ranks in placement_of(config, layout).holders.items()}
    for before, after, event in zip(places[:-1], places[1:], told, strict=True):
        assert sum(before[key] != after[key] for key in before) == event["experts"]


def test_experts_stay_where_the_gain_is_small(ranks, reference, tmp_path):
    found, _ = run(ranks, tmp_path, "PP2xEP2", "placement.every=1", "placement.least_gain=9")
    assert not found.told("placement") and {step["generation"] for step in found.steps} == {1}
    assert found.losses == reference("PP2xEP2")[0].losses


def test_a_group_that_is_cut(ranks, tmp_path):
    """Eight groups of two experts on three nodes: two of them are cut. Routing does not see it."""
    whole = run(ranks, tmp_path / "whole", "EP3")
    cut = run(ranks, tmp_path / "cut", "EP3", "layout.group_parts=2")
    moving = run(ranks, tmp_path / "moving", "EP3", "layout.group_parts=2", *MOVING)
    assert moving[0].told("placement")
    for found, at_the_end in (cut, moving):
        assert close(found, whole[0]) and furthest(at_the_end, whole[1]) < 1e-12
    for name, counts in (("whole", [4, 6, 6]), ("cut", [5, 5, 6]), ("moving", [5, 5, 6])):
        assert all(sorted(map(len, entry["experts"])) == counts for entry in ledger(tmp_path / name)[0]["placement"])
