"""What must hold of a run whatever has befallen it, from what it left behind and what was seen of its processes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.data.dataset import Dataset
from jobs import audit
from jobs.benches.chaos.company import COPIES, Company, Strike
from orchestrator.config.run_config import load
from orchestrator.data.ledger import CUT, STEP, entries, read
from orchestrator.told import kinds
from orchestrator.told.consumers import Selection
from orchestrator.told.lines import Told, from_json

EXPLAINED_SECONDS = 60.0
"""After its cause is gone a strike still explains a loss so long: what was noticed late, or failed as it joined again."""
CURVE_STEPS, CURVE_BAR = 200, 1e-9
"""Training multiplies rounding errors: so many steps are the same within so much, relative."""
LATER_BAR = 1e-3
"""Of the steps after those."""
RESTARTING = ("stopped and started",)
"""Kinds that end all processes, and are meant to."""
ENDING = ("drain called off",)
"""Kinds that end the processes of their nodes though none is lost for it."""
GAP_SECONDS = 10.0
"""What holds steps up within so long after a strike is counted as its doing."""


READ = Selection((kinds.GenerationFormed, kinds.GenerationLoaded, kinds.RanksLost, kinds.CommittedStateLost, kinds.StartedOver), leaves=(
    kinds.LayoutPlanned, kinds.Resumed, kinds.ExpertsPlaced, kinds.Interrupted, kinds.RanksAborted, kinds.CoordinatorRestarted,
    kinds.NodesJoining, kinds.NodesDraining, kinds.NodesAwaited, kinds.NodeIdle, kinds.NodeBarred, kinds.Slow, kinds.SlowOver,
    kinds.CheckpointWritten, kinds.CheckpointFailed, kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway,
    kinds.DataAway, kinds.ControlStoreAway, kinds.ControlStoreBack, kinds.Validated, kinds.NotFinite, kinds.Replayed,
    kinds.UnknownEvent))
"""What this bench looks up."""


class JsonLines:
    """Lines of JSON of a file that grows, or is written anew: those that are whole, each parsed once."""

    def __init__(self, path: Path, parse: Callable[[dict[str, Any]], Any] = dict):
        self._path, self._parse = path, parse
        self._file: tuple[int, int] | None = None  # inode, bytes read
        self.lines: list[Any] = []

    def read(self) -> list[Any]:
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                if self._file is None or self._file[0] != found.st_ino or found.st_size < self._file[1]:
                    self._file, self.lines = (found.st_ino, 0), []
                file.seek(self._file[1])
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet, or its storage is away just now
            return self.lines
        if newline:
            self._file = self._file[0], self._file[1] + len(whole) + 1
            self.lines += [self._parse(json.loads(line)) for line in whole.split(b"\n")]
        return self.lines


@dataclass
class Observed:
    """A run as it was seen while it was struck. ended: how, if it should not have; processes: when, and those of each node."""

    name: str
    seed: int
    folder: Path
    strikes: list[Strike]
    ended: str | None = None
    processes: list[tuple[float, dict[str, frozenset[int]]]] = field(default_factory=list)

    def look(self, company: Company) -> None:
        """At the processes of nodes that nothing has befallen. Raises RunEnded."""
        seen = {node: frozenset(company.processes(node)) for node in company.nodes()}
        self.processes.append((time.time(), seen))


@dataclass
class Verdict:
    """Of one run: lists of what must be empty. gaps: seconds from a strike alone until the next step, by kind."""

    name: str
    seed: int
    folder: Path
    ended: str | None
    kinds: tuple[str, ...]
    lost_steps: list[str]
    audit: list[str]
    restarted: list[str]
    needless: list[str]
    gaps: list[tuple[str, float]]
    losses: list[float]
    norms: Mapping[int, float]
    events: Mapping[str, int]
    curve: list[str] = field(default_factory=list)
    apart: tuple[float, float] = (0.0, 0.0)

    def compare(self, reference: Sequence[Mapping[str, Any]]) -> None:
        """Every committed step's loss, and the norms that metrics have (lines are dropped while storage is full), with those of
        an undisturbed run; `apart`: largest relative difference, first steps and later ones."""
        first = later = 0.0
        if len(reference) < len(self.losses):
            self.curve.append(f"{len(self.losses)} steps, {len(reference)} to compare with")
        for step, (loss, theirs) in enumerate(zip(self.losses, reference, strict=False)):
            for key, mine in (("loss", loss), ("gradient_norm", self.norms.get(step))):
                if mine is None:
                    continue
                apart, early = abs(mine - theirs[key]) / abs(theirs[key]), step < CURVE_STEPS
                first, later = (max(first, apart), later) if early else (first, max(later, apart))
                if not apart <= (CURVE_BAR if early else LATER_BAR):
                    self.curve.append(f"step {step}: {key} {mine!r}, undisturbed {theirs[key]!r}")
        self.apart = first, later

    def problems(self) -> list[str]:
        return [*([f"ended: {self.ended}"] if self.ended else []), *(
            f"{name}: {text}" for name in ("lost_steps", "audit", "restarted", "needless", "curve")
            for text in getattr(self, name)[:5])]

    def text(self) -> str:
        return "\n    ".join([f"{self.name}, seed {self.seed}: {len(self.losses)} steps, {len(self.kinds)} faults, "
                              f"{'held' if not self.problems() else 'BROKE'}", *self.problems()])

    def summary(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "steps": len(self.losses), "strikes": len(self.kinds),
                "events": dict(self.events), "apart": {"first_steps": self.apart[0], "later": self.apart[1]},
                "problems": self.problems()}


def verdict(observed: Observed) -> Verdict:
    """Raises OSError, ConfigError, DatasetError, StorageError: it has left nothing to look at."""
    config = load(str(observed.folder / "config.yaml"))
    events = JsonLines(observed.folder / "events.jsonl", from_json).read()
    steps = JsonLines(observed.folder / "metrics.jsonl").read()
    ledger = (observed.folder / "ledger.jsonl").read_text().splitlines()
    audited = audit.audit(str(observed.folder), config, Dataset.open(config.data.path))
    return Verdict(
        observed.name, observed.seed, observed.folder, observed.ended, tuple(strike.kind for strike in observed.strikes),
        lost_steps(ledger, observed.strikes, events),
        [problem.text for problem in audited.problems], restarted(observed.processes, observed.strikes),
        needless(events, observed.strikes), gaps(steps, observed.strikes),
        [line["loss"] for line in read(ledger).steps], {step["step"]: step["gradient_norm"] for step in steps},
        Counter(told.name for told in events))


# --- what must be empty ----------------------------------------------------------------------------------------------

def lost_steps(ledger: Sequence[str], strikes: Sequence[Strike], events: Sequence[Told]) -> list[str]:
    """Cuts, and states lost, but where a strike went beyond the copies; a line that is not one step after the one before."""
    found, committed, cuts = [], 0, 0
    for entry in entries(ledger):
        if entry.kind == CUT:
            cuts += entry.values["step"] < committed
            committed = min(committed, entry.values["step"])
        elif entry.kind == STEP:
            if entry.values["step"] != committed:
                found.append(f"line {entry.number} is of step {entry.values['step']}, not {committed}")
            committed = entry.values["step"] + 1
    beyond = [strike for strike in strikes if strike.takes > COPIES]
    if cuts > len(beyond):
        found.append(f"{cuts} times committed steps were cut off, {len(beyond)} faults went beyond the copies")
    lost = READ.of(events, kinds.CommittedStateLost, kinds.StartedOver)
    found += [f"{told.name} at {told.time:.1f}: {told.event.reason}" for told in lost
              if not any(_explains(strike, told.time) for strike in beyond)]
    return found


def needless(events: Sequence[Told], strikes: Sequence[Strike]) -> list[str]:
    """Members that were named lost though nothing befell their node that explains it."""
    found = []
    for told in READ.of(events, kinds.RanksLost):
        for member in told.event.members:
            node = member.rpartition("/")[0]
            if not any(strike.takes and node in strike.nodes and _explains(strike, told.time) for strike in strikes):
                found.append(f"{member} at {told.time:.1f}: {'; '.join(told.event.reasons)}")
    return found


def restarted(processes: Sequence[tuple[float, Mapping[str, Collection[int]]]], strikes: Sequence[Strike]) -> list[str]:
    """Processes that were there at one look at their node and not at the next, though nothing befell it that explains it."""
    found, last = [], {}
    for after, seen in processes:
        for node, pids in seen.items():
            before, earlier = last.get(node, (after, pids))
            gone = set(earlier) - set(pids)
            if gone and not any((node in strike.nodes and (strike.takes or strike.kind in ENDING) or strike.kind in RESTARTING)
                                and strike.began <= after and before <= _until(strike) for strike in strikes):
                found.append(f"{node}: {sorted(gone)} between {before:.1f} and {after:.1f}")
            last[node] = after, pids
    return found


def _explains(strike: Strike, at: float) -> bool:
    return strike.began - 0.5 <= at <= _until(strike)


def _until(strike: Strike) -> float:
    return float("inf") if strike.ended is None else strike.ended + EXPLAINED_SECONDS


# --- how long ----------------------------------------------------------------------------------------------------------

def gaps(steps: Sequence[Mapping[str, Any]], strikes: Sequence[Strike]) -> list[tuple[str, float]]:
    """Of each strike that no other is near: the longest time without a step that began within seconds of it, from it on."""
    found = []
    for strike in strikes:
        alone = not any(other is not strike and abs(other.began - strike.began) < GAP_SECONDS for other in strikes)
        ends = [(before["time"], after["time"]) for before, after in zip(steps, steps[1:], strict=False)
                if after["time"] > strike.began and before["time"] < strike.began + GAP_SECONDS]
        if alone and ends:
            found.append((strike.kind, max(after - max(before, strike.began) for before, after in ends)))
    return found
