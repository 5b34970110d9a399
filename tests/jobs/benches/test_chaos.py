"""Whom the chaos bench strikes, and when it says that a run has ended."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from jobs.benches.chaos import bench as chaos
from jobs.benches.chaos.bench import Settings, episode
from jobs.benches.chaos.company import COPIES, FaultKind, RunEnded, Strike
from orchestrator.told.lines import to_json
from tests.told_events import told

FAST = Settings(least_seconds=0.0, most_seconds=0.02, at_once=3)


class Toy:
    """Five nodes; a loss is got over (or not) a little later. most: nodes whose loss was not got over, at most."""

    kinds = {"node killed": FaultKind(1, 1), "link cut": FaultKind(2, 1), "coordinator killed": FaultKind(0, 0),
             "more than copies": FaultKind(3, 3)}

    def __init__(self, folder: Path, goes_on: bool = True):
        self.folder, self.goes_on, self.strikes, self.most, self.closed = folder, goes_on, [], 0, False
        self._open: list[tuple[Strike, float]] = []
        self._write("events.jsonl", to_json(told("generation", time.time(), nodes=5)))
        self._step()

    def nodes(self) -> Sequence[str]:
        struck = {node for strike, _ in self._open for node in strike.nodes}
        return [node for node in "abcde" if node not in struck]

    def strike(self, kind: str, nodes: Sequence[str], chance: random.Random) -> Strike:
        strike = Strike(kind, self.kinds[kind].takes, time.time(), tuple(nodes))
        self.strikes.append(strike)
        self._open.append((strike, time.time() + 0.05 * chance.random()))
        self.most = max(self.most, sum(open_.takes for open_, _ in self._open if open_.takes <= COPIES))
        return strike

    def whole(self) -> bool:
        for strike, until in list(self._open):
            if self.goes_on and time.time() > until:
                self._open.remove((strike, until))
                strike.ended = time.time()
        self._step()
        return not self._open

    def processes(self, node: str) -> Collection[int]:
        if self.goes_on:
            self.whole()
        return [1]

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _step(self) -> None:
        if self.goes_on:
            self._write("metrics.jsonl", {"time": time.time()})

    def _write(self, name: str, values: dict) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(values) + "\n")


@pytest.mark.parametrize("seed", range(4))
def test_never_more_than_the_copies_cover(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(chaos, "_LOOK_SECONDS", 0.005)
    monkeypatch.setattr(chaos, "_BEYOND_CHANCE", 0.5)
    toy = Toy(tmp_path)
    observed = episode(lambda name: toy, "toy", FAST, 1.0, seed)
    assert observed.ended is None and toy.closed and toy.most <= COPIES
    assert len(toy.strikes) > 2
    others = [strike for strike in toy.strikes if 0 < strike.takes <= COPIES]
    for beyond in (strike for strike in toy.strikes if strike.takes > COPIES):
        assert not any(beyond.began <= other.began < (beyond.ended or other.began + 1) for other in others)


def test_the_same_seed_draws_the_same_first_strike(tmp_path, monkeypatch):
    first = []
    for name in "xy":
        (tmp_path / name).mkdir()
        toy = Toy(tmp_path / name)
        episode(lambda name, toy=toy: toy, "toy", FAST, 0.1, 7)
        first.append((toy.strikes[0].kind, toy.strikes[0].nodes))
    assert first[0] == first[1]


def test_a_run_without_steps_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "GOES_ON_SECONDS", 0.2)
    toy = Toy(tmp_path, goes_on=False)
    observed = episode(lambda name: toy, "toy", FAST, 5.0, 1)
    assert "no step is committed" in observed.ended and toy.closed


def test_a_node_that_does_not_come_back_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "WHOLE_SECONDS", 0.2)

    class Lame(Toy):
        def whole(self) -> bool:
            super().whole()
            return False
    toy = Lame(tmp_path)
    assert "not all nodes are used again" in episode(lambda name: toy, "toy", FAST, 0.1, 1).ended


def test_what_the_company_says_is_the_end_ends_the_episode(tmp_path):
    class Dead(Toy):
        def nodes(self) -> Sequence[str]:
            raise RunEnded("exit code 1")
    toy = Dead(tmp_path)
    assert episode(lambda name: toy, "toy", FAST, 5.0, 1).ended == "exit code 1" and toy.closed
