"""What a coordinator finds that takes over, and what a change of layout that was interrupted leaves to go on from."""

from __future__ import annotations

import os
import signal

import pytest
import runtime
import torch
from faults import QUICK, STEPS, ranks_of
from runtime import Run, configured, meeting_place, on_all

from actors import rank as rank_module
from actors.formation import Formation
from actors.processes import ProcessRanks
from orchestrator.membership import Member


@pytest.fixture
def own():
    """Two processes, their layout, and who they are."""
    config, layout = configured("PP2", "model.num_hidden_layers=2")
    with ProcessRanks(config, 2, runtime.host, start_method="forkserver") as ranks:
        yield ranks, config, layout, [Member(place.node, place.local) for place in layout.places]


@pytest.mark.parametrize("committed, loaded, base", [(0, False, None), (0, True, 1), (1, True, None)])
def test_only_state_after_all_committed_steps_is_taken_over(own, committed, loaded, base):
    """A coordinator that dies before its ranks have any state leaves none, though all know the generation."""
    ranks, config, layout, members = own
    first = Formation(config, layout, ranks, "127.0.0.1", meeting_place())
    first.open()
    first.form()
    if loaded:
        first.everywhere("initialise")
    first.close()
    second = Formation(config, layout, ranks, "127.0.0.1", meeting_place())
    try:
        second.adopt(members, 0, committed)
        assert (second.base.generation if second.base else None) == base and second.generation == 1
    finally:
        second.close()


def skew(host):
    """So that some experts are chosen more, and move."""
    for layer, bias in host.biases.items():
        bias += torch.linspace(0, 0.2, len(bias), dtype=bias.dtype).roll(layer)


def dies_in_a_move(host):
    def struck(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    rank_module.carry_over = struck


def spare(host):
    pass


MOVING = (STEPS, "placement.every=2", "placement.least_gain=0.02", "training.batch_sequences=16", "model.n_routed_experts=16",
          "model.n_group=8", "model.topk_group=4")


def test_a_rank_dies_while_experts_move(stage):
    """The others are through with parts of the move: they go back to where all are."""
    config, layout = stage.configured("EP4", *MOVING)

    def begin() -> None:
        on_all(stage.company, skew, 4)

    def arm() -> None:
        stage.company.start("do", [(spare,), (spare,), (dies_in_a_move,)]).results(60)

    undisturbed = stage.run("EP4", *MOVING, before={0: begin})
    assert undisturbed.told("placement") and undisturbed.error is None
    run = stage.run("EP4", *QUICK, *MOVING, "elastic.cool_down_seconds=60", before={0: begin, 1: arm}, run=Run())
    assert run.error is None, run.events
    assert [len(event["members"]) for event in run.told("lost")] == [1] and len(ranks_of(run)) == 2
    torch.testing.assert_close(torch.tensor(run.losses, dtype=torch.float64), torch.tensor(undisturbed.losses, dtype=torch.float64),
                               rtol=1e-9, atol=1e-12)
