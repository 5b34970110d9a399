"""What a rank says of its state, between the calls that change it, and which changes it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from runtime import TIMEOUT_SECONDS, batch_of, configured, form, meeting_place, on_all, same, state

from actors.calls.messages import Assignment, Former, PendingUpdate, RankState
from actors.comm.waiting import Aborted, OutOfStep
from actors.data.batching import Dealer
from orchestrator.plan.scheduling import programs_for

CONFIG, LAYOUT = configured("EP4", "model.num_hidden_layers=2")
RATE = 1e-2


@pytest.fixture
def formed(ranks):
    """Ranks of generation 40, without state."""
    form(ranks, CONFIG, LAYOUT, generation=40)
    yield ranks
    on_all(ranks, begin_anew, LAYOUT.size)


def begin_anew(host) -> None:
    host.authority.attached("", 0)


def on_each(ranks, method: str, arguments: list[tuple]) -> list[Any]:
    return ranks.start(method, arguments).results(TIMEOUT_SECONDS)


def everywhere(ranks, method: str, *arguments: Any) -> list[Any]:
    return on_each(ranks, method, [arguments] * LAYOUT.size)


def applied(ranks) -> list[list[tuple[int, int | None]]]:
    return [[(place.generation, updates) for place, updates in found.held] for found in everywhere(ranks, "recall")]


def step(ranks, number: int, apply: PendingUpdate | None = None) -> None:
    requests = Dealer(CONFIG, LAYOUT).requests(batch_of(CONFIG, number), apply, training=True)
    programs = programs_for(CONFIG, LAYOUT.folding, requests[0].microbatches, training=True)
    on_each(ranks, "step", [(replace(request, program=programs[place.position]),)
                            for request, place in zip(requests, LAYOUT.places)])


def refused(host, method: str, arguments: tuple) -> str:
    with pytest.raises(OutOfStep) as caught:
        getattr(host, method)(*arguments)
    return str(caught.value)


def refuses(ranks, method: str, *arguments: Any) -> list[str]:
    return on_all(ranks, refused, LAYOUT.size, method, arguments)


def again(ranks, generation: int, former: Former | None) -> None:
    """The same layout, with the state of another generation."""
    store = meeting_place()
    place = ("127.0.0.1", store.port), f"formation-{store.add('formations', 1)}"
    known = everywhere(ranks, "recall")[0].held
    placement = known[-1][0].placement
    on_each(ranks, "form", [(Assignment(generation, rank, CONFIG, LAYOUT, placement, *place, former),) for rank in range(LAYOUT.size)])


def former_of(ranks, generation: int, updates: int, came_from: tuple[int | None, ...] = (0, 1, 2, 3)) -> Former:
    place = everywhere(ranks, "recall")[0].held[-1][0]
    return Former(generation, CONFIG, LAYOUT, place.placement, updates, came_from)


def test_state_counts_from_when_it_is_whole(formed):
    assert applied(formed) == [[(40, None)]] * 4
    everywhere(formed, "initialise")
    assert applied(formed) == [[(40, 0)]] * 4


def unpublished(host) -> tuple[Any, bool]:
    publish = host._publish

    def fails(*arguments: Any) -> None:
        raise Aborted("as if a peer had gone")

    host._publish = fails
    try:
        host.initialise()
    except Aborted:
        pass
    finally:
        host._publish = publish
    return host.recall().held[0][1], host.recall().published


def test_state_whose_weights_were_never_published_is_none(formed):
    assert on_all(formed, unpublished, 4) == [(None, False)] * 4


def test_no_step_is_taken_on_state_of_another(formed):
    assert "step 0 on a state after None updates" in refuses_step(formed, 0)[0]
    everywhere(formed, "initialise")
    assert "step 1 on a state after 0 updates" in refuses_step(formed, 1)[0]
    step(formed, 0)
    step(formed, 1, PendingUpdate(0, RATE))
    assert applied(formed) == [[(40, 1)]] * 4


def refuses_step(ranks, number: int) -> list[str]:
    return refuses(ranks, "step", Dealer(CONFIG, LAYOUT).requests(batch_of(CONFIG, number), None, training=True)[0])


def test_an_update_is_applied_once_and_in_turn(formed):
    everywhere(formed, "initialise")
    refuses(formed, "apply", PendingUpdate(0, RATE))  # nothing has been computed
    step(formed, 0)
    refuses(formed, "apply", PendingUpdate(1, RATE))
    everywhere(formed, "apply", PendingUpdate(0, RATE))
    before = state(formed, LAYOUT)
    assert "update of step 0 on a state after 1 updates" in refuses(formed, "apply", PendingUpdate(0, RATE))[0]
    assert same(state(formed, LAYOUT), before) and applied(formed) == [[(40, 1)]] * 4


def test_finish_completes_what_is_due_and_does_it_once(formed):
    everywhere(formed, "initialise")
    step(formed, 0)
    for _ in range(2):
        assert everywhere(formed, "finish", PendingUpdate(0, RATE), 40) == [RankState(40, 1, 0, False)] * 4
    assert everywhere(formed, "finish", PendingUpdate(1, RATE), 40) == [RankState(40, 1, 0, False)] * 4


def test_finish_goes_back_to_the_base(formed):
    """A change of layout that went well here and failed elsewhere: its numbers are the same, but it is not the base."""
    everywhere(formed, "initialise")
    before = state(formed, LAYOUT)
    again(formed, 41, former_of(formed, 40, 0))
    assert applied(formed) == [[(40, 0), (41, 0)]] * 4
    assert everywhere(formed, "finish", None, 40) == [RankState(40, 0, None, False)] * 4
    assert applied(formed) == [[(40, 0)]] * 4 and same(state(formed, LAYOUT), before)
    again(formed, 42, former_of(formed, 40, 0))
    assert everywhere(formed, "finish", None, 42)[0].generation == 42


def test_who_does_not_have_the_base_has_nothing(formed):
    everywhere(formed, "initialise")
    assert everywhere(formed, "finish", PendingUpdate(3, RATE), 39) == [RankState(None, None, None, False)] * 4
    assert applied(formed) == [[]] * 4


def forms(host, assignment: Assignment) -> tuple[str, list[int]]:
    with pytest.raises(Aborted) as caught:
        host.form(assignment)
    return str(caught.value), [place.generation for place, _ in host.recall().held]


def test_who_was_given_up_forms_nothing_and_keeps_what_it_has(formed):
    everywhere(formed, "initialise")
    everywhere(formed, "abort", 42)
    place = everywhere(formed, "recall")[0].held[0][0]
    for generation in (41, 42):
        assignment = replace(place, generation=generation, former=None)
        assert on_all(formed, forms, 4, assignment) == [(f"generation {generation} was given up", [40])] * 4
    again(formed, 43, replace(former_of(formed, 40, 0), publish=True))
    assert applied(formed)[0] == [(40, 0), (43, 0)]


def test_who_has_another_state_than_expected_does_not_take_part(formed):
    everywhere(formed, "initialise")
    place = everywhere(formed, "recall")[0].held[0][0]
    former = former_of(formed, 40, 1)
    found = on_all(formed, forms, 4, replace(place, generation=41, former=former))
    assert all("a state after 1 updates in generation 40 is not here" in text and held == [40] for text, held in found)


def known_programs(host) -> list[tuple[bool, int]]:
    return list(host._programs)


def test_a_step_learns_the_program_that_comes_with_it(formed):
    everywhere(formed, "initialise")
    step(formed, 0)
    microbatches = Dealer(CONFIG, LAYOUT).requests(batch_of(CONFIG, 0), None, training=True)[0].microbatches
    assert on_all(formed, known_programs, 4) == [[(True, microbatches)]] * 4
