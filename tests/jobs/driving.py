"""A driver without a cluster: what it asks of its coordinator is answered by a stand-in, and what it ends is noted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

import actors.hosts.cluster
import actors.hosts.coordinator
from actors.calls.messages import Failure, Outcome
from jobs.driver import session
from jobs.driver.running import RunActors
from orchestrator.config.run_config import parse
from orchestrator.protocol.members import Member
from orchestrator.told.lines import Told

RANK = Member("a", 0)
DONE = Outcome(3, False, None)
STEP = {"step": 0, "loss": 1.0, "tokens_per_second": 1.0, "overlap_ratio": 0.1, "bubble_ratio": 0.1, "nodes": 2}


class Method:
    """Of an actor. answers: one a call, the last one again and again; one that is an exception is raised by `ray.get`."""

    def __init__(self, *answers: Any):
        self.answers, self.calls = list(answers), 0

    def remote(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def coordinator(*updates: Any, open: Any = "a:2", outcome: Outcome | Failure = DONE) -> SimpleNamespace:
    """updates: its answers; it is over when there are no more."""
    return SimpleNamespace(open=Method(open), begin=Method(None), stop=Method(None), outcome=Method(outcome),
                           updates=Method(*updates, (0, [], True)))


def get(reference: Any, timeout: float) -> Any:
    if isinstance(reference, Exception):
        raise reference
    return reference


class Driver:
    """A run whose driver is this process. ended: what it has ended, by name or one by one. made: coordinators that it starts when
    the first one is lost, one after the other. living: coordinators of the run by epoch, as Ray has them."""

    def __init__(self, folder: Any, first: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
        self.ended, self.made, self.living = [], [], {}
        monkeypatch.setattr(session, "is_local", lambda: False)
        monkeypatch.setattr(session, "_requests", [])
        monkeypatch.setattr(session, "ray_address", lambda: "ray")
        config = parse({}, [f"run.directory={folder}"])
        self.run = RunActors.of(first, 0, 1, "driver", config, None, "a:1", "data", None)
        self.run._ray = SimpleNamespace(exceptions=ray.exceptions, get=get, kill=self.ended.append)
        making = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: self.made.pop(0)))
        monkeypatch.setattr(actors.hosts.coordinator, "Coordinator", making)
        monkeypatch.setattr(actors.hosts.cluster, "beside_the_driver", dict)
        monkeypatch.setattr(actors.hosts.cluster, "end_actors", lambda name, seconds: self.ended.append("all"))
        monkeypatch.setattr(actors.hosts.cluster, "named_actors", lambda name: (self.living, {RANK: "rank"}))


class Shown:
    """What a driver shows."""

    def __init__(self):
        self.said, self.steps = [], 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, values: dict) -> None:
        self.steps += 1

    def event(self, told: Told) -> None:
        self.say(told.name)


class Signals:
    """Stands for an Interrupt."""

    def __init__(self, requested: bool = False):
        self.requested = requested

    def check(self) -> None:
        pass

    def wait(self, seconds: float) -> None:
        pass

    install = check
