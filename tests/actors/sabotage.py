"""Harm to ranks that is more than a signal at a place of a step, and what a run must be like in spite of it.

Functions that take a `host` run in a rank's process; all else in the coordinator's.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from faults import RELATIVE, SMALLEST, Company, Stage, exactly
from runtime import TIMEOUT_SECONDS, Host, Run

from actors.hosts.processes import ProcessRanks
from actors.protocol.shell import RealShell
from jobs.benches.shared.networks import Network, enter
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.members import Member

# --- in a rank's process ---------------------------------------------------------------------------------------------


def die(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_it_forms(host: Host, place: str) -> None:
    """The next generation: "set up" with all state carried over; "publish"; "formed", before it can say so."""
    form = host.form

    def struck(assignment: Any) -> Any:
        if place == "set up":
            host._set_up = die
        elif place == "publish":
            host._publish = die
        answer = form(assignment)
        die()
        return answer
    host.form = struck


def dies_after_a_move(host: Host) -> None:
    """Of experts: when it has the new state, and working weights are to be published."""
    rearrange = host.rearrange

    def struck(wanted: Any) -> Any:
        host._publish = die
        return rearrange(wanted)
    host.rearrange = struck


def dies_before_a_move(host: Host) -> None:
    host.rearrange = die


def moves_late(host: Host) -> None:
    """It begins to move experts only when it has been told that this is off."""
    told, give_up, rearrange = threading.Event(), host.authority.give_up, host.rearrange

    def given_up(number: int | None) -> None:
        give_up(number)
        told.set()

    def struck(wanted: Any) -> Any:
        assert told.wait(TIMEOUT_SECONDS)
        return rearrange(wanted)
    host.authority.give_up, host.rearrange = given_up, struck


def hangs(host: Host) -> None:
    """Its compute thread, in the next step and for good; nothing else of it does."""
    host._executor.run = lambda *arguments: threading.Event().wait()


def skew(host: Host) -> None:
    """So that some experts are chosen more, and move."""
    for layer, bias in host.biases.items():
        bias += torch.linspace(0, 0.2, len(bias), dtype=bias.dtype).roll(layer)


def _spare(host: Host) -> None:
    pass


class _NoMemory(Host):
    """A process on a device that is full."""

    def form(self, assignment: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def without_memory(config: RunConfig) -> Host:
    return _NoMemory(config, "127.0.0.1")


def inside(config: RunConfig, namespace: str, address: str) -> Host:
    """In a network namespace."""
    enter(namespace)
    return Host(config, address)


# --- from outside ----------------------------------------------------------------------------------------------------


def arm(company: Company, rank: int, function: Callable[..., None], *arguments: Any) -> None:
    """Have one rank run this."""
    company.start("do", [(_spare,)] * rank + [(function, *arguments)]).results(TIMEOUT_SECONDS)


def stall(pids: Iterable[int], seconds: float) -> threading.Timer:
    """Stop these processes, for so long. The timer that has them go on is to be joined."""
    stopped = list(pids)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)

    def go_on() -> None:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    timer = threading.Timer(seconds, go_on)
    timer.start()
    return timer


class Survivors:
    """Who is there at a time, to see afterwards that nobody of them was ended for another's fault."""

    def __init__(self, company: Company):
        self._company, self._pids = company, {}

    def note(self) -> None:
        self._pids = {member: self._company.pid_of(member) for member in self._company._of_member}

    def check(self, run: Run, *struck: str) -> None:
        """Those that were `struck` have been told of as lost, and nobody else; all others have the processes that they had."""
        assert sorted(lost(run)) == sorted(struck), run.told("lost")
        assert self._pids
        for member, pid in self._pids.items():
            if str(member) not in struck:
                assert self._company.pid_of(member) == pid, f"{member} has another process"


def lost(run: Run) -> list[str]:
    """Members that were told of as lost."""
    return [member for event in run.told("lost") for member in event["members"]]


def reason(run: Run) -> str:
    """Of all losses, in one."""
    return "; ".join(reason for event in run.told("lost") for reason in event["reasons"])


def newcomers(company: Company) -> list[Member]:
    """Members of a later incarnation than the first."""
    return [member for member in company._of_member if member.incarnation]


def check_curve(stage: Stage, run: Run, name: str, *overrides: str) -> None:
    """Whatever coordinators a run has had: each step stands in the ledger once, with the loss of an undisturbed run."""
    assert run.error is None, (run.error, run.events)
    wanted, lines = stage.reference(name, *overrides), run.folder.ledger_lines()
    assert [line["step"] for line in lines] == list(range(len(wanted.losses)))
    torch.testing.assert_close(exactly([line["loss"] for line in lines]), wanted.losses[:, 0], rtol=RELATIVE, atol=SMALLEST)


def once(hooks: Mapping[int, Callable[[], Any]]) -> dict[int, Callable[[], Any]]:
    """A step may come again, what is done before it may not."""
    left = dict(hooks)
    return {step: lambda step=step: left.pop(step, lambda: None)() for step in hooks}


class Died(Exception):
    """The coordinator's process has ended."""


def dies(monkeypatch: Any, when: Callable[[Any], bool], carried_out: bool) -> None:
    """The coordinator, at every such command: before or after it is carried out."""
    carry_out = RealShell.carry_out

    def strike(self: RealShell, command: Any) -> None:
        if when(command) and not carried_out:
            raise Died
        carry_out(self, command)
        if when(command):
            raise Died
    monkeypatch.setattr(RealShell, "carry_out", strike)


# --- links -----------------------------------------------------------------------------------------------------------


class Apart(Company):
    """A company of which every process is in a network namespace of its own, as on a host of its own."""

    def __init__(self, config: RunConfig, network: Network):
        self.network, self.steps, self._counted = network, Counter(), set()
        self._places = [(interface.namespace, interface.address) for interface in network.interfaces]
        ProcessRanks.__init__(self, config, len(self._places), inside, self._places, start_method="forkserver")

    def heal(self, size: int) -> None:
        """Whole links; and fresh processes, so that each is in the namespace of its node."""
        for one, other in itertools.permutations(range(len(self._places)), 2):
            self.cut(one, other, restored=True)
        for number in list(self._processes):
            self._end(self._processes.pop(number), at_once=True)
        for place in self._places[:size]:
            self._make(place)
        self._seats, self._of_member = sorted(self._processes), {}
        self.news()
        self.steps.clear()
        self._counted.clear()

    def cut(self, sender: int, receiver: int, *, restored: bool = False) -> None:
        """What one sends to the other goes nowhere, and nobody is told."""
        here, there = self.network.interface(sender), self.network.interface(receiver)
        hardware = there.hardware_address if restored else "02:44:52:00:77:77"
        subprocess.run(["ip", "-n", here.namespace, "neigh", "replace", there.address, "lladdr", hardware, "dev", here.device,
                        "nud", "permanent"], check=True, timeout=TIMEOUT_SECONDS)
