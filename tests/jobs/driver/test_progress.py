"""What is shown of a run, on streams that take it, do not, or fail."""

from __future__ import annotations

import io
import os
import threading

import pytest

from jobs.driver import progress, running
from jobs.driver.progress import Progress
from orchestrator.told.kinds import UnknownEvent
from orchestrator.told.lines import Told
from tests.cluster import eventually
from tests.jobs.driving import DONE, STEP, Driver, Signals, coordinator
from tests.told_events import told


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_step_is_told_now_and_then_and_before_what_is_said():
    stream = io.StringIO()
    with Progress(9, stream) as shown:
        for step in range(4):
            shown.step(STEP | {"step": step})
        shown.event(told("interrupted", 1.0, reason="it hangs", generation=4))
        shown.step(STEP | {"step": 8})
    said = stream.getvalue().splitlines()
    assert [line.partition("  ")[0] for line in said] == ["step 1/9", "step 4/9", "interrupted: reason it hangs", "step 9/9"]
    assert said[2] == "interrupted: reason it hangs  generation 4", "what is null is left out"


def test_on_a_terminal_a_step_takes_the_place_of_the_one_before():
    stream = Terminal()
    with Progress(9, stream) as shown:
        shown.step(STEP)
        shown.step(STEP | {"step": 1})
        shown.say("that is all")
    said = stream.getvalue().split("\r")
    assert [text[:8] for text in said] == ["", "step 1/9", "step 2/9", "\x1b[Kthat "]


def broken(kind: str):
    if kind == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("kind", ["full disk", "reader gone"])
def test_a_driver_whose_output_fails_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(running, "POLL_SECONDS", 0.01)
    driver = Driver(tmp_path, coordinator(*[(number, [("step", STEP)], False) for number in range(5)]), monkeypatch)
    with broken(kind) as stream, Progress(9, stream) as shown:
        with driver.run:
            assert driver.run.follow(shown, Signals()) == DONE
        shown.say("done")
    assert capsys.readouterr().err.count("nothing more is shown") == 1


def test_a_driver_is_heard_though_its_terminal_is_stopped(tmp_path, monkeypatch):
    """After elastic.orphan_seconds without a word of it the run would be saved and end."""
    monkeypatch.setattr(running, "POLL_SECONDS", 0.01)
    reader, writer = os.pipe()
    long = [("event", Told(1.0, UnknownEvent("x" * 70_000, {})))]  # more than a pipe holds
    driver = Driver(tmp_path, coordinator(*[(number, long, False) for number in range(50)]), monkeypatch)
    with os.fdopen(reader) as terminal, os.fdopen(writer, "w") as stream:
        shown, outcomes = Progress(9, stream), []
        following = threading.Thread(target=lambda: outcomes.append(driver.run.follow(shown, Signals())), daemon=True)
        following.start()
        eventually(lambda: outcomes == [DONE], 20, "the run is followed to its end")
        read = threading.Thread(target=lambda: [terminal.readline() for _ in range(50)], daemon=True)
        read.start()
        with shown:
            pass
        read.join(20)
        assert not read.is_alive()  # all was shown when the terminal went on


def test_what_is_not_taken_for_long_is_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(progress, "_MOST_TEXTS", 3)
    stopped, stream = threading.Event(), io.StringIO()
    monkeypatch.setattr(stream, "flush", lambda: stopped.wait(20), raising=False)
    with Progress(9, stream) as shown:
        shown.say("first")
        eventually(lambda: stream.getvalue() == "first\n", 20, "the first")
        for number in range(9):
            shown.say(str(number))
        stopped.set()
    assert stream.getvalue() == "first\n6\n7\n8\n"
