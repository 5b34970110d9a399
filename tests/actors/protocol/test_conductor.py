"""The loop between the world and the state machine: in order, in time, and nobody who waits is left waiting."""

from __future__ import annotations

import queue
import threading

import pytest

from actors.protocol.conductor import Conductor, NotReached
from orchestrator.protocol.commands import EndRun, NeedBatch, Tell
from orchestrator.protocol.events import BatchReady, Beat, Ending, Goal, Head, Heard, LineRefused, Started, StopAsked, Tick
from orchestrator.told.kinds import Replayed

SECONDS = 20.0
FIRST = Started(1, (), Head(), (), Goal(1))
END = EndRun(Ending.DONE, "", 1, True)
REFUSED = LineRefused(0, Ending.SUPERSEDED, "another process has written to it")


class Machine:
    """Answers each event with what `script` says; keeps what it was told."""

    def __init__(self, script):
        self.script, self.told, self.wake = script, [], None

    def handle(self, event, now):
        self.told.append(event)
        return self.script(self, event, now)

    def snapshot(self):
        return tuple(map(type, self.told))

    def kinds(self):
        return [type(event) for event in self.told]


class Shell:
    """Keeps what it is to carry out. on(command): what else is to happen then. superseded: what a look at the ledger finds."""

    def __init__(self, on=lambda command: None, superseded=None):
        self.commands, self.befores, self.on, self.superseded, self.looks = [], [], on, superseded, []

    def seen(self, item):
        return item if isinstance(item, tuple) else (item,)

    def heard(self):
        return Heard({})

    def returned(self, seconds):
        self.looks.append(seconds)
        return self.superseded

    def before(self, event):
        self.befores.append(event)

    def carry_out(self, command):
        self.commands.append(command)
        self.on(command)

    def after(self, run):
        pass


def test_what_is_posted_is_told_in_order_and_commands_are_carried_out():
    def script(machine, event, now):
        if event == FIRST:
            return [NeedBatch(0), NeedBatch(1)]
        return [Tell(Replayed(1)), END] if event == BatchReady(1) else []

    machine = Machine(script)
    conductor = Conductor(machine, 1000.0)
    shell = Shell(lambda command: isinstance(command, NeedBatch) and conductor.post((BatchReady(command.step),)))
    assert conductor.conduct(FIRST, shell) == END
    assert machine.told == [FIRST, BatchReady(0), BatchReady(1)] == shell.befores == [event for event, _ in conductor.recorded]
    assert shell.commands == [NeedBatch(0), NeedBatch(1), Tell(Replayed(1)), END]


def test_time_passes_when_the_machine_wants_it_to_and_beats_are_told_meanwhile():
    def script(machine, event, now):
        if event == FIRST:
            machine.wake = now + 0.5
        return [END] if isinstance(event, Tick) and now >= machine.wake else []

    machine = Machine(script)
    conductor = Conductor(machine, 0.4)
    conductor.conduct(FIRST, Shell())
    begun, ended = conductor.recorded[0][1], conductor.recorded[-1][1]
    assert 0.5 <= ended - begun < SECONDS
    assert machine.kinds().count(Heard) >= 3 and isinstance(machine.told[-1], Tick)


def test_a_function_is_called_on_the_conductors_thread():
    called = []

    def script(machine, event, now):
        return [END] if isinstance(event, BatchReady) else []

    conductor = Conductor(Machine(script), 1000.0)
    conductor.post(lambda: called.append(threading.current_thread()))
    conductor.post(BatchReady(0))
    conductor.conduct(FIRST, Shell())
    assert called == [threading.current_thread()]


def test_a_stop_that_is_asked_before_the_machine_is_told_of_an_event_comes_first():
    """Whoever watches a step's commit and stops the run there sees no further step begun."""
    machine = Machine(lambda machine, event, now: [END] if isinstance(event, BatchReady) else [])
    conductor = Conductor(machine, 1000.0)

    class Stopping(Shell):
        def before(self, event):
            if isinstance(event, BatchReady):
                conductor.stop()

    conductor.post(BatchReady(0))
    conductor.conduct(FIRST, Stopping())
    assert machine.told == [FIRST, StopAsked(), BatchReady(0)]


def test_a_stop_before_the_run_begins_is_its_second_event():
    machine = Machine(lambda machine, event, now: [END] if isinstance(event, StopAsked) else [])
    conductor = Conductor(machine, 1000.0)
    conductor.stop()
    conductor.conduct(FIRST, Shell())
    assert machine.told == [FIRST, StopAsked()]


def test_beats_are_looked_at_as_soon_as_a_silence_may_be_too_long():
    """Not only four times in it. Whose silence is too long already, or not yet within the next quarter, changes nothing."""
    now = [0.0]
    beats = {"long gone": Beat(-50.0), "silent": Beat(0.3), "heard": Beat(3.9)}

    class Clocked(queue.SimpleQueue):
        def get(self, timeout):
            now[0] += timeout
            raise queue.Empty

    class Beating(Shell):
        def heard(self):
            looks.append(now[0])
            return Heard(beats)

    looks, machine = [], Machine(lambda machine, event, at: [END] if at > 5.0 else [])
    conductor = Conductor(machine, 4.0, clock=lambda: now[0])
    conductor._items = Clocked()
    conductor.conduct(FIRST, Beating())
    assert looks == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.301, 5.301])


@pytest.mark.parametrize("away, looks", [(1.9, []), (100.0, [4.0])])
@pytest.mark.parametrize("superseded", [None, REFUSED])
@pytest.mark.parametrize("waits", [False, True])
def test_who_was_away_looks_first_of_all_whether_it_was_superseded(away, looks, superseded, waits):
    """It stands still while it carries something out, or waits for the next event, and what comes meanwhile would have it end
    processes that are another's by now. The look takes no longer than silence may last; what is not found out then does not hold
    the run up."""
    now = [0.0]

    def freeze(command):
        if isinstance(command, NeedBatch):
            conductor.post(BatchReady(0))
            now[0] += 0.0 if waits else away

    class Thawing(Shell):
        def seen(self, item):
            now[0] += away if waits else 0.0
            return super().seen(item)

    def script(machine, event, now):
        return [NeedBatch(0)] if event == FIRST else [END] if isinstance(event, BatchReady | LineRefused) else []

    machine = Machine(script)
    conductor, shell = Conductor(machine, 4.0, clock=lambda: now[0]), Thawing(freeze, superseded)
    conductor.conduct(FIRST, shell)
    assert shell.looks == looks
    found = REFUSED if looks and superseded else BatchReady(0)
    assert [event for event in machine.told if not isinstance(event, Heard)] == [FIRST, found]
    assert found is not REFUSED or machine.told == [FIRST, REFUSED], "not even beats come before it"


def test_another_thread_can_wait_for_what_the_machine_comes_to():
    def script(machine, event, now):
        return [END] if event == BatchReady(9) else []

    machine = Machine(script)
    conductor = Conductor(machine, 1000.0)
    found = []

    def wait():
        conductor.wait_until(lambda run: BatchReady(3) in run.told, SECONDS)
        found.append(list(machine.told))
        conductor.post(BatchReady(9))

    def act():
        conductor.wait_until(lambda run: FIRST in run.told, SECONDS)
        for number in range(5):
            conductor.post(BatchReady(number))

    threads = [threading.Thread(target=target, daemon=True) for target in (wait, act)]
    for thread in threads:
        thread.start()
    conductor.conduct(FIRST, Shell())
    for thread in threads:
        thread.join(SECONDS)
    assert len(found) == 1 and BatchReady(3) in found[0]


def test_who_waits_is_told_when_it_takes_too_long_and_when_the_run_is_over():
    machine = Machine(lambda machine, event, now: [END] if isinstance(event, BatchReady) else [])
    conductor = Conductor(machine, 1000.0)
    refused = []

    def wait():
        for seconds in (0.05, SECONDS):
            if seconds == SECONDS:
                conductor.post(BatchReady(0))
            with pytest.raises(NotReached):
                conductor.wait_until(lambda run: False, seconds)
            refused.append(seconds)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    conductor.conduct(FIRST, Shell())
    thread.join(SECONDS)
    assert refused == [0.05, SECONDS]
    with pytest.raises(NotReached):
        conductor.wait_until(lambda run: True, SECONDS)


def test_an_error_in_the_shell_ends_the_loop_and_frees_who_waits():
    conductor = Conductor(Machine(lambda machine, event, now: [NeedBatch(0)] if isinstance(event, BatchReady) else []), 1000.0)
    waiting = threading.Event()
    refused = []

    def fail(command):
        raise ZeroDivisionError

    def wait():
        waiting.set()
        with pytest.raises(NotReached):
            conductor.wait_until(lambda run: False, SECONDS)
        refused.append(True)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert waiting.wait(SECONDS)
    conductor.post(BatchReady(0))
    with pytest.raises(ZeroDivisionError):
        conductor.conduct(FIRST, Shell(fail))
    thread.join(SECONDS)
    assert refused
