"""Whom a rank obeys, and what it refuses because it was told to give it up."""

from __future__ import annotations

import pytest

from actors.comm.waiting import Aborted
from actors.runtime.authority import Authority, Superseded


class Groups:
    """What an authority sees of a generation."""

    def __init__(self, number: int):
        self.number, self.aborts = number, 0

    def abort(self) -> None:
        self.aborts += 1


@pytest.fixture
def authority():
    return Authority()


def test_what_was_given_up_is_refused_though_it_begins_later(authority):
    authority.give_up(5)
    authority.give_up(3)
    for generation in (1, 3, 5):
        with pytest.raises(Aborted, match=f"generation {generation} was given up"):
            authority.check(generation)
        with pytest.raises(Aborted):
            authority.enter(Groups(generation))
    authority.check(0)
    authority.check(6)
    authority.enter(Groups(6))
    with pytest.raises(Aborted):
        authority.renumber(4)
    assert authority.generation.number == 6


@pytest.mark.parametrize("number, aborts", [(5, 0), (6, 1), (9, 1), (None, 1)])
def test_an_abort_ends_generations_up_to_its_number(authority, number, aborts):
    groups = Groups(6)
    authority.enter(groups)
    authority.give_up(number)
    assert groups.aborts == aborts


def test_who_left_is_not_aborted(authority):
    groups = Groups(6)
    authority.enter(groups)
    assert authority.leave() is groups
    authority.give_up(6)
    assert groups.aborts == 0


def test_a_newer_coordinator_ends_what_the_older_began_and_counts_on_its_own(authority):
    groups = Groups(6)
    authority.attached("a run", 1)
    authority.enter(groups)
    authority.give_up(4)
    authority.attached("a run", 2)
    assert (groups.aborts, authority.epoch, authority.given_up) == (1, 2, 0)
    with pytest.raises(Superseded, match="epoch 1 is over: this rank obeys epoch 2"):
        authority.heed(1)
    with pytest.raises(Superseded):
        authority.attached("a run", 1)
    authority.heed(3)
    assert authority.epoch == 3 and groups.aborts == 2


def test_the_same_coordinator_may_come_again(authority):
    authority.attached("a run", 2)
    authority.give_up(7)
    authority.attached("a run", 2)
    assert authority.given_up == 7


def test_a_call_of_an_older_coordinator_forms_nothing_any_more(authority):
    authority.attached("a run", 1)
    authority.serve(1, 4)
    authority.heed(2)
    with pytest.raises(Superseded):
        authority.enter(Groups(4))
    with pytest.raises(Superseded):
        authority.serve(1, 4)
    authority.serve(2, 4)
    authority.enter(Groups(4))
    with pytest.raises(Aborted):
        authority.give_up(4)
        authority.serve(2, 4)


@pytest.mark.parametrize("run, epoch", [("another", 1), ("a run", 0)])
def test_another_run_and_a_coordinator_without_epochs_begin_anew(authority, run, epoch):
    authority.attached("a run", 3)
    authority.give_up(7)
    authority.attached(run, epoch)
    assert (authority.epoch, authority.given_up) == (epoch, 0)
