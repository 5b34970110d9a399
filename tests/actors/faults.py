"""Harm to rank processes at a chosen place of a step, and what a run must be like afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime
import torch
from runtime import TIMEOUT_SECONDS, Host, Run, configured, state, train

import actors.state.checkpoint
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId
from orchestrator.protocol.members import Member
from orchestrator.schedule.ir.actions import ActionKind
from orchestrator.topology import Node

KILL, FREEZE = signal.SIGKILL, signal.SIGSTOP
COMPUTE = (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT,
           ActionKind.PAIR, ActionKind.SPLIT)
RELATIVE = 1e-9
SMALLEST = 1e-12
"""Below it a value of the state is a rounding error of sums whose terms are not: relative to nothing."""


class Company(ProcessRanks):
    """Four rank processes that may be harmed, and are made whole for the next run. `steps`: how often each was begun.

    They are forked from a server that has imported torch, so a new one is there in a fraction of a second.
    """

    def __init__(self, config: RunConfig, size: int):
        self.steps: Counter[int] = Counter()
        self._counted: set[tuple[int, int]] = set()
        super().__init__(config, size, runtime.host, start_method="forkserver")

    def send(self, call: CallId, member: Member, generation: int, method: str, arguments: tuple, lane: CallLane) -> None:
        if method == "step" and (key := (arguments[0].step, generation)) not in self._counted:
            self._counted.add(key)
            self.steps[key[0]] += 1
        super().send(call, member, generation, method, arguments, lane)

    def strike(self, rank: int, number: int) -> None:
        """A signal to whoever sits there, whatever has become of the others."""
        os.kill(self._processes[self._seats[rank]].handle.pid, number)

    def heal(self, size: int) -> None:
        """Fresh processes in place of those that ended or are frozen, and `size` of them in all."""
        for number, process in list(self._processes.items()):
            if not process.handle.is_alive() or frozen(process.handle.pid) or len(self._processes) > size:
                self._end(self._processes.pop(number), at_once=True)
        while len(self._processes) < size:
            self._make(())
        self._seats, self._of_member = sorted(self._processes), {}
        self.news()
        self.steps.clear()
        self._counted.clear()


def frozen(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# --- places of a step, in a rank's process ---------------------------------------------------------------------------


def doom(host: Host, place: str, count: int, number: int) -> None:
    """Have this process get a signal when it comes to a place for the `count`-th time from now, counted from 0."""
    left = [count]

    def strike() -> None:
        left[0] -= 1
        if left[0] == -1:  # to this thread: of a signal to the process it may be another that takes it, while this one runs on
            signal.pthread_kill(threading.get_ident(), number)

    def before(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def struck(*arguments: Any, **keywords: Any) -> Any:
            strike()
            return original(*arguments, **keywords)
        setattr(holder, name, struck)

    def computes() -> None:
        handlers = host._executor._handlers
        for kind in COMPUTE:
            handlers[kind] = _struck(handlers[kind], strike)

    groups = list(host._generation._groups.values())
    match place:
        case "compute":
            computes()
        case "communication":
            for group in groups:
                before(group, "_start")
        case "reduce":
            for group in groups:
                before(group, "all_reduce")
        case "update":
            before(host, "_update")
        case "publish":
            before(host, "_publish")
        case "gather":
            for group in groups:
                before(group, "all_gather")
        case "validation":
            evaluate = host.evaluate

            def doomed(request: Any) -> Any:
                host.evaluate = evaluate
                computes()
                return evaluate(request)
            host.evaluate = doomed
        case "snapshot":
            before(host, "snapshot")
        case "write":
            before(actors.state.checkpoint.storage, "write_atomic")
        case "form":
            before(host, "form")
        case "carry":
            before(host, "_carry_over")
        case "finish":
            before(host, "finish")
        case _:
            raise ValueError(place)


def _struck(original: Callable[..., Any], strike: Callable[[], None]) -> Callable[..., Any]:
    def struck(*arguments: Any) -> Any:
        strike()
        return original(*arguments)
    return struck


def spare(host: Host) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """A signal to `rank`, when it comes to `place` for the `count`-th time from the beginning of `step` on.

    Places besides those of `doom`: "between" two steps; before ("uncommitted") and after ("committed") the ledger's line.
    """

    step: int
    place: str
    rank: int
    count: int = 0
    signal: signal.Signals = KILL

    def arm(self, company: Company, folder: Folder) -> None:
        if self.place == "between":
            company.strike(self.rank, self.signal)
        elif self.place in ("uncommitted", "committed"):
            folder.at[self.place, self.step] = lambda: company.strike(self.rank, self.signal)
        else:
            others = [(spare,)] * self.rank
            company.start("do", [*others, (doom, self.place, self.count, self.signal)]).results(TIMEOUT_SECONDS)


class Folder(RunFolder):
    """`at[place, step]()` runs before or after a ledger's line."""

    def __init__(self, directory: str):
        super().__init__(directory, "run")
        self.at: dict[tuple[str, int], Callable[[], None]] = {}

    def append(self, values: Mapping[str, Any]) -> None:
        step = None if "kind" in values else values["step"]
        self.at.pop(("uncommitted", step), lambda: None)()
        super().append(values)
        self.at.pop(("committed", step), lambda: None)()


# --- runs ------------------------------------------------------------------------------------------------------------


def whole(run: Run, ranks: int) -> None:
    """Wait, between two steps, until so many ranks may be used, or somebody is lost."""
    def usable(machine: Any) -> bool:
        decision = machine.decision
        return bool(decision.lost) or sum(node.ranks for node in decision.nodes) >= ranks
    run.trainer.wait_until(usable, TIMEOUT_SECONDS)


STEPS = "training.steps=9"
SHALLOW = "model.num_hidden_layers=2"
"""What befalls a step does not depend on how deep the model is, but time does."""
QUICK = ("elastic.cool_down_seconds=0.2", "elastic.beat_seconds=0.1")
FROZEN = ("elastic.silence_seconds=1.5",)


@dataclass
class Reference:
    losses: torch.Tensor
    state: dict[tuple[str, str], torch.Tensor]


class Stage:
    """Runs on one company, and what the undisturbed ones gave. `aborts`: events `aborted` of all runs."""

    def __init__(self, company: Company, folder: Path):
        self.company, self._folder, self._count = company, folder, 0
        self._references: dict[tuple[str, ...], Reference] = {}
        self.aborts: list[dict[str, Any]] = []
        self.layouts: list[dict[str, Any]] = []

    def run(self, name: str, *overrides: str, before: Mapping[int, Callable[[], Any]] | None = None, run: Run | None = None,
            watch: Callable[[str, dict[str, Any]], None] = lambda kind, values: None, folder: Folder | None = None) -> Run:
        config, layout = self.configured(name, *overrides)
        self.company.heal(layout.size)
        found = train(self.company, folder or self.folder(), config, layout, before=before, run=run, watch=watch)
        self.aborts += found.told("aborted")
        self.layouts += found.told("layout")
        return found

    def configured(self, name: str, *overrides: str) -> tuple[RunConfig, Layout]:
        return configured(name, *(() if name == "PP4" else (SHALLOW,)), *overrides)

    def folder(self) -> Folder:
        self._count += 1
        return Folder(str(self._folder / str(self._count)))

    def with_faults(self, name: str, faults: Sequence[Fault], *overrides: str, regrown: Sequence[int] = (),
                    **options: Any) -> Run:
        """A run on which these fall. Right before the steps `regrown` all ranks of the first layout are waited for."""
        run, folder = Run(), self.folder()
        size = self.configured(name, *overrides)[1].size

        def before(step: int) -> Callable[[], None]:
            def act() -> None:
                if step in regrown:
                    whole(run, size)
                for fault in faults:
                    if fault.step == step:
                        fault.arm(self.company, folder)
            return act
        hooks = {step: before(step) for step in {fault.step for fault in faults} | set(regrown)} | options.pop("before", {})
        once = {step: _once(hook) for step, hook in hooks.items()}  # a step may come again
        return self.run(name, *QUICK, *overrides, before=once, run=run, folder=folder, **options)

    def reference(self, name: str, *overrides: str) -> Reference:
        """The same run, undisturbed, and without what changes no loss: saving and validating."""
        beside = ("elastic.", "checkpoint.", "training.validat")
        key = (name, *(override for override in overrides if not override.startswith(beside)))
        if key not in self._references:
            run = self.run(*key)
            assert run.error is None
            self._references[key] = Reference(exactly(run.losses), state(self.company, self.configured(*key)[1]))
        return self._references[key]

    def check(self, run: Run, name: str, *overrides: str, redone: int = 1) -> None:
        """Losses and state are those of the undisturbed run, the ledger has each step once, few steps were run twice."""
        assert run.error is None, run.events
        steps, layout = dict(self.company.steps), run.trainer.layout
        after = state(self.company, layout)
        wanted = self.reference(name, *overrides)
        for step, losses in zip(run.steps, run.losses):
            torch.testing.assert_close(exactly(losses), wanted.losses[step["step"]], rtol=RELATIVE, atol=SMALLEST)
        assert after.keys() == wanted.state.keys()
        for key, values in after.items():
            torch.testing.assert_close(values, wanted.state[key], rtol=RELATIVE, atol=SMALLEST,
                                       msg=lambda text, key=key: f"{key}: {text}")
        lines = run.folder.ledger_lines()
        assert [line["step"] for line in lines] == list(range(len(wanted.losses)))
        assert {line["step"]: line["loss"] for line in lines} == {step["step"]: step["loss"] for step in run.steps}
        assert sorted(steps) == list(range(len(wanted.losses))) and sum(steps.values()) <= len(steps) + redone, steps


def exactly(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def node(number: int, ranks: int = 1) -> Node:
    return Node(f"virtual-{number}", ranks)


def _once(action: Callable[[], None]) -> Callable[[], None]:
    left = [action]
    return lambda: left.pop()() if left else None


def ranks_of(run: Run) -> list[str]:
    """Layouts that a run went through, in short."""
    return [event["layout"].split(":")[0] for event in run.told("generation")]
