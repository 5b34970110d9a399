"""Runs that are struck again and again, by one to three faults every few seconds, and what must hold of them all the same.

Episodes take turns on real raylets in network namespaces, driven by `jobs.train`, and on plain processes, where what a rank does
can be spoilt from inside. A seed says what befalls whom and when; never more than `elastic.copies` nodes are at risk at a time,
except by the one kind that is meant to go beyond. An episode ends when all nodes are back: the run is asked to save and to end.
Then its ledger, its audit, its losses, its processes and its events are looked at (`chaos_verdict`).
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from jobs.benches.chaos.company import COPIES, Company, RunEnded, Strike
from jobs.benches.chaos.processes import processes
from jobs.benches.chaos.raylets import raylets
from jobs.benches.chaos.text import undisturbed
from jobs.benches.chaos.verdict import READ, JsonLines, Observed, Verdict, verdict
from orchestrator.config.run_config import Real, RunConfig, Section
from orchestrator.told.kinds import GenerationFormed, GenerationLoaded, RanksLost
from orchestrator.told.lines import from_json

GOES_ON_SECONDS = 180.0
"""Without a committed step, whatever befalls it: then it counts as ended."""
WHOLE_SECONDS = 240.0
"""At the end of an episode: for all nodes to be back and used."""
_LOOK_SECONDS = 0.5
_BEYOND_CHANCE = 0.2
"""Of what goes beyond the copies, where it could be drawn, to be left in the draw: it costs the steps since a checkpoint."""


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    minutes: Real = Field(10.0, gt=0, description="in all, without set-up and comparison")
    episode_minutes: Real = Field(10.0, gt=0)
    seed: int = Field(1, ge=0)
    least_seconds: Real = Field(5.0, ge=0, description="from a group of faults to the next")
    most_seconds: Real = Field(20.0, gt=0)
    at_once: int = Field(3, ge=1, description="faults of a group, at most")
    on: Literal["both", "raylets", "processes"] = "both"
    keep: bool = Field(False, description="keep the folders of runs that passed, too")


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """config: not used, the runs are the bench's own. Counts of what must not happen, and by kind seconds to the next step."""
    folder = Path(tempfile.mkdtemp(prefix="dualray-chaos-"))
    found: list[Verdict] = []
    count = max(1, round(settings.minutes / settings.episode_minutes))
    seconds = 60 * settings.minutes / count
    sorts = ("raylets", "processes") if settings.on == "both" else (settings.on,)
    for sort in sorts:  # a cluster at a time: their processes share the cores
        (folder / sort).mkdir()
        with {"raylets": raylets, "processes": processes}[sort](folder / sort) as begin:
            for index in range(sorts.index(sort), count, len(sorts)):
                observed = episode(begin, f"{sort}-{index}", settings, seconds, settings.seed + index)
                found.append(verdict(observed))
                say(found[-1].text())
    reference = undisturbed(folder / "undisturbed", max(len(one.losses) for one in found))
    for one in found:
        one.compare(reference)
        say(one.text())
    result = _result(settings, found)
    if result["valid"] and not settings.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"kept: {folder}")
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- an episode ------------------------------------------------------------------------------------------------------

def episode(begin: Callable[[str], Company], name: str, settings: Settings, seconds: float, seed: int) -> Observed:
    """One run from its begin to its end, good or bad."""
    company = begin(name)
    observed = Observed(name, seed, company.folder, company.strikes)
    try:
        _Strikes(company, observed, settings, seed).go_on(seconds)
        company.stop()
    except RunEnded as error:
        observed.ended = str(error)
    finally:
        company.close()
    return observed


class _Strikes:
    """Strikes a company at random, within what its copies cover."""

    def __init__(self, company: Company, observed: Observed, settings: Settings, seed: int):
        self._company, self._observed, self._settings = company, observed, settings
        self._chance, self._pause = random.Random(seed), threading.Event()
        self._events = JsonLines(company.folder / "events.jsonl", from_json)
        self._commits = JsonLines(company.folder / "metrics.jsonl", lambda values: values["time"])
        self._got_over: set[int] = set()
        self._steps, self._moved, self._looked = 0, time.monotonic(), 0.0

    def go_on(self, seconds: float) -> None:
        """Strike for so long, then wait until all are back. Raises RunEnded."""
        until, patient = time.monotonic() + seconds, deque([-1, -1], maxlen=2)
        while time.monotonic() < until:
            self._wait(self._chance.uniform(self._settings.least_seconds, self._settings.most_seconds))
            if patient[0] != self._steps:  # what was struck two groups ago has gone on since
                patient.append(self._steps)
                self._group()
        deadline = time.monotonic() + WHOLE_SECONDS
        while not self._company.whole():
            if time.monotonic() > deadline:
                raise RunEnded(f"not all nodes are used again within {WHOLE_SECONDS:g} s of the last fault")
            self._look()
            self._pause.wait(_LOOK_SECONDS)

    def _group(self) -> None:
        for _ in range(self._chance.randint(1, self._settings.at_once)):
            drawn = self._draw()
            if drawn is None:
                return
            kind, nodes = drawn
            say(f"{self._observed.name}, {self._steps} steps: {kind} {' '.join(node[:8] for node in nodes)}")
            self._company.strike(kind, nodes, self._chance)
            self._wait(self._chance.choice((0.0, 0.3, 2.0)) * self._chance.random())

    def _draw(self) -> tuple[str, list[str]] | None:
        """What is struck next: None if nothing may be."""
        free, left = sorted(self._company.nodes()), self._covered()
        kinds = [kind for kind, needs in sorted(self._company.kinds.items()) if needs.nodes <= len(free)
                 and (needs.takes <= left or (needs.takes > COPIES and self._company.whole()))]
        beyond = self._chance.random() < _BEYOND_CHANCE
        kinds = [kind for kind in kinds if self._company.kinds[kind].takes <= COPIES or beyond]
        if not kinds:
            return None
        kind = self._chance.choice(kinds)
        return kind, self._chance.sample(free, self._company.kinds[kind].nodes)

    def _covered(self) -> int:
        """Nodes that may yet be lost: what those leave that are lost, or will be, and without whom nothing was committed yet."""
        at_risk = sum(strike.takes for strike in self._company.strikes if not self._settled(strike))
        generations = READ.of(self._events.read(), GenerationFormed, GenerationLoaded)
        seated = generations[-1].event.nodes if generations else 1
        return min(COPIES, seated - 1) - at_risk

    def _settled(self, strike: Strike) -> bool:
        """Whether the run has got over what it takes: a step was committed without whom it lost, or everybody is back."""
        if not strike.takes or id(strike) in self._got_over:
            return True
        events = self._events.read()
        lost = [told.time for told in READ.of(events, RanksLost) if told.time >= strike.began
                and any(member.rpartition("/")[0] in strike.nodes for member in told.event.members)]
        done = strike.ended is not None and self._company.whole()
        if lost and strike.takes <= COPIES:
            after = [told.time for told in READ.of(events, GenerationFormed, GenerationLoaded) if told.time >= lost[0]]
            done = done or bool(after) and any(time > after[0] for time in self._commits.read()[-1:])
        if done:
            self._got_over.add(id(strike))
        return done

    def _wait(self, seconds: float) -> None:
        """Raises RunEnded."""
        until = time.monotonic() + seconds
        while True:
            self._look()
            left = until - time.monotonic()
            if left <= 0:
                return
            self._pause.wait(min(left, _LOOK_SECONDS))

    def _look(self) -> None:
        """Raises RunEnded: no step for too long."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._observed.look(self._company)
        steps = self._commits.read()
        if len(steps) != self._steps or self._waits():
            self._steps, self._moved = len(steps), now
        if now - self._moved > GOES_ON_SECONDS:
            raise RunEnded(f"no step is committed for {GOES_ON_SECONDS:g} s, {self._steps} are")

    def _waits(self) -> bool:
        """Whether more is away than the run can do without, as far as whoever strikes it knows."""
        return any(strike.ended is None and strike.takes > COPIES for strike in self._company.strikes)


# --- all of them -----------------------------------------------------------------------------------------------------

def _result(settings: Settings, found: list[Verdict]) -> dict[str, Any]:
    checks = {
        "runs ended: 0": not any(one.ended for one in found),
        "committed steps lost, beyond what copies cover: 0": not any(one.lost_steps for one in found),
        "every audit is clean": not any(one.audit for one in found),
        "losses are the undisturbed run's": not any(one.curve for one in found),
        "survivors restarted: 0": not any(one.restarted for one in found),
        "needless losses: 0": not any(one.needless for one in found)}
    strikes = Counter(kind for one in found for kind in one.kinds)
    seconds = [(kind, gap) for one in found for kind, gap in one.gaps]
    return {"settings": settings.model_dump(), "episodes": [one.summary() for one in found],
            "strikes": dict(sorted(strikes.items())), "steps": sum(len(one.losses) for one in found),
            "seconds_to_the_next_step": _by_kind(seconds), "checks": checks, "valid": all(checks.values())}


def _by_kind(seconds: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Median and worst, and of how many."""
    by_kind: dict[str, list[float]] = {}
    for kind, gap in seconds:
        by_kind.setdefault(kind, []).append(gap)
    return {kind: {"median": sorted(gaps)[len(gaps) // 2], "worst": max(gaps), "count": len(gaps)}
            for kind, gaps in sorted(by_kind.items())}
