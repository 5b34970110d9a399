"""The rank model of the simulator does what a real rank does: whatever is called, aborted, and dies."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runtime import configured

from orchestrator.protocol.members import Member
from tests.simulation.conformance import Play
from tests.simulation.hosted import Processes
from tests.simulation.rank_model import RankModel
from tests.simulation.sides import Differ, Move

CONFIG, _ = configured("EP4", "model.num_hidden_layers=2", "elastic.form_seconds=600", "training.step_timeout_seconds=600")
"""Nothing ends because time is up: what has to be ended by an abort is."""
EXAMPLES, LONG = 50, int(os.environ.get("DUALRAY_SEQUENCES", 0))
"""Drawn sequences; with DUALRAY_SEQUENCES so many others, different ones each time."""
TROUBLES = ("", "", "", "", "absent", "absent, who dies", "absent, then another coordinator", "before", "doom", "doom")
OTHERS = ("begin", "form", "initialise", "step", "apply", "rearrange", "snapshot", "finish", "wrong", "claim", "bare", "abort",
          "kill", "take_over")
picks = st.integers(0, 15)
moves = st.builds(Move, st.sampled_from(OTHERS), picks, st.sampled_from(TROUBLES), picks)
training = st.builds(Move, st.sampled_from(("step", "step", "apply", "form", "rearrange", "snapshot")), picks,
                     st.sampled_from(TROUBLES), picks)
recoveries = st.builds(lambda pick, trouble, who: [Move("finish", 1), Move("form", pick, trouble, who)], picks,
                       st.sampled_from(TROUBLES), picks)
sequences = st.builds(
    lambda pick, before, after: [Move("begin", pick), Move("initialise"), Move("step"), *before, *sum(after, [])], picks,
    st.lists(training, max_size=2),
    st.lists(st.one_of(moves.map(lambda move: [move]), training.map(lambda move: [move]), recoveries), min_size=1, max_size=5))
TRAINED = [Move("begin", 15), Move("initialise"), Move("step"), Move("step")]
RECOVERED = [Move("finish", 1), Move("form", 15), Move("step")]
KNOWN = {
    "a whole run": [*TRAINED, Move("apply"), Move("rearrange", 1), Move("step"), Move("snapshot"), Move("finish", 1),
                    Move("form", 7), Move("step"), Move("take_over"), Move("form", 15), Move("step")],
    "fewer, and more": [*TRAINED, Move("form", 1), Move("step"), Move("form", 6), Move("bare", 15), Move("kill"), *RECOVERED],
    "one does not begin": [Move("begin", 15, "absent", 1), *TRAINED, Move("step", 0, "absent", 1), *RECOVERED],
    "one dies before it begins": [*TRAINED, Move("step", 0, "absent, who dies", 1), *RECOVERED],
    "one dies within a step": [*TRAINED, Move("step", 1, "doom", 1), *RECOVERED, Move("step", 2, "doom", 1), *RECOVERED],
    "one dies at its update": [*TRAINED, Move("step", 2, "doom", 1), *RECOVERED, Move("apply", 1, "doom"), *RECOVERED],
    "one dies taking its place": [*TRAINED, Move("form", 7, "doom", 1), Move("form", 15, "doom", 1), *RECOVERED],
    "one dies before state moves": [*TRAINED, Move("form", 7), Move("form", 15, "doom", 1), Move("form", 15), Move("step")],
    "initial state half there": [Move("begin", 15), Move("initialise", 0, "absent", 2), *TRAINED],
    "initial state made again": [*TRAINED, Move("initialise"), Move("step"), Move("step")],
    "experts move without one": [*TRAINED, Move("apply"), Move("rearrange", 0, "absent"), *RECOVERED, Move("apply"),
                                 Move("rearrange", 1, "absent, who dies"), *RECOVERED],
    "who is behind comes as a newcomer": [*TRAINED, Move("step", 0, "absent", 1), Move("finish", 3), *RECOVERED],
    "one makes no snapshot": [*TRAINED, Move("snapshot", 0, "absent", 1), Move("snapshot")],
    "another coordinator": [*TRAINED, Move("step", 0, "absent, then another coordinator", 2), Move("claim"), *RECOVERED],
    "what no coordinator calls": [*TRAINED, *(Move("wrong", pick, "", who) for pick in range(5) for who in range(4)),
                                  Move("take_over"), *(Move("wrong", pick) for pick in range(5))],
    "some call in a generation that others have left": [*TRAINED, Move("form", 14), Move("begin", 9), Move("wrong", 1, "", 1)],
}


@pytest.fixture(scope="module")
def processes():
    with Processes(CONFIG, [Member(f"n{index}", 0) for index in range(4)]) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def played(processes, folder, moves):
    play = Play(processes, CONFIG)
    play.write_into(folder)
    play.play(moves)
    return play


@pytest.mark.parametrize("name", KNOWN)
def test_known_sequences(processes, folder, name):
    play = played(processes, folder, KNOWN[name])
    assert len(play.done) > len(KNOWN[name])


def conform(examples, **options):
    return settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck), print_blob=False, **options)


@conform(EXAMPLES - len(KNOWN), derandomize=True, phases=[Phase.generate])
@given(moves=sequences)
def test_drawn_sequences(processes, folder, moves):
    played(processes, folder, moves)


@pytest.mark.long
@conform(LONG or 300, derandomize=not LONG, phases=[Phase.generate])
@given(moves=sequences)
def test_many_drawn_sequences(processes, folder, moves):
    played(processes, folder, moves)


@pytest.mark.parametrize("change", ["back_to", "settle", "update"])
def test_a_model_that_does_something_else_is_found(processes, folder, monkeypatch, change):
    """The comparison sees: state of another generation that is kept; that goes too late; an update that is not made."""
    def keeps(rank, generation):
        rank.newest = generation if generation in rank.held else None

    def applies_nothing(rank, step):
        rank.state.applied, rank.published = step + 1, False

    instead = {"back_to": keeps, "settle": lambda rank: None, "update": applies_nothing}
    monkeypatch.setattr(RankModel, change, instead[change])
    with pytest.raises(Differ):
        played(processes, folder, KNOWN["a whole run"])
