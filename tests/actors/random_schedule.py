"""Schedules that are legal and nothing else: every choice is drawn, so that a run of one uses all that programs can say."""

from __future__ import annotations

import random
import threading
from collections import Counter
from itertools import combinations, count, product

import pytest

from orchestrator.plan import scheduling
from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Schedule, SplitAction, Work
from orchestrator.schedule.ir.stages import SEARCHED, Stages

F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT
PAIRS = {(F, F), (F, B), (F, I), (F, W), (B, B), (B, I), (B, W), (I, I), (I, W)}

_CHOICE, _PATIENCE = 6, 0.95


def random_schedule(stages: Stages, microbatches: int, seed: int) -> Schedule:
    """Positions take turns at random, and do one thing, two as a pair (rare kinds of pairs first), or one in two halves."""
    draw, made = random.Random(seed), Counter()
    rows: list[list[Work]] = [[] for _ in range(stages.positions)]
    waiting = _all(stages, microbatches, draw)
    done: set[tuple[ActionKind, int, int, int]] = set()
    while waiting:
        position = draw.choice(sorted({place for place, _ in waiting}))
        ready = [compute for place, compute in waiting if place == position and _ready(compute, stages, done)]
        if len(ready) < min(_CHOICE, sum(place == position for place, _ in waiting)) and draw.random() < _PATIENCE:
            continue  # with more to choose from, rare pairs come up
        if not ready:
            continue
        action = _draw(ready, made, draw)
        made[tuple(compute.kind for compute in action.computes)] += 1
        rows[position].append(action)
        for compute in action.computes:
            waiting.remove((position, compute))
            done.add((compute.kind, _way(compute, stages), compute.stage, compute.microbatch))
    return Schedule(SEARCHED, stages, microbatches, tuple(map(tuple, rows)))


def varied_schedule(stages: Stages, microbatches: int) -> Schedule:
    """The first drawn one with pairs of all kinds, splits of all kinds, and every way to meet a split again: forward and
    backward each alone, in a pair or split."""
    return next(found for seed in count() if _says_everything(found := random_schedule(stages, microbatches, seed)))


def draw_schedules(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """From here on a run's schedule is a varied one of 12 microbatches. Returns a list of those that runs were given."""
    used, planned = [], scheduling.schedule_of

    def drawn(config, stages, microbatches, *, training):
        if threading.current_thread() is not threading.main_thread():
            # it prepares for losses, and what they leave may be too small for a schedule that says everything
            return planned(config, stages, microbatches, training=training)
        used.append(varied_schedule(stages, microbatches))
        return used[-1]

    monkeypatch.setattr(scheduling, "schedule_of", drawn)
    monkeypatch.setattr(scheduling, "smallest_microbatches", lambda *arguments, training: 12)
    return used


def _says_everything(schedule: Schedule) -> bool:
    pairs, splits, forms = set(), set(), {}
    for action in (action for row in schedule.rows for action in row):
        if isinstance(action, Pair):
            pairs.add((action.first.kind, action.second.kind))
        elif isinstance(action, SplitAction):
            splits.add(action.whole.kind)
        for compute in action.computes:
            if compute.kind is not W:
                forms.setdefault((compute.stage, compute.slot, compute.microbatch), []).append(type(action))
    ways = {(forward, backward) for forward, backward in forms.values()}
    return pairs == PAIRS and splits == {F, B, I} and ways == set(product((Compute, Pair, SplitAction), repeat=2))


def _all(stages: Stages, microbatches: int, draw: random.Random) -> list[tuple[int, Compute]]:
    found = []
    for path in stages.paths:
        for microbatch in range(microbatches // len(stages.paths)):
            for stage, (position, slot) in enumerate(path):
                kinds = draw.choice([(F, B), (F, I, W)])
                found += [(position, Compute(kind, stage, slot, microbatch)) for kind in kinds]
    return found


def _way(compute: Compute, stages: Stages) -> int:
    return compute.slot if len(stages.paths) > 1 else 0


def _ready(compute: Compute, stages: Stages, done: set) -> bool:
    """What it needs, said once more in its own words."""
    def has(kinds: tuple[ActionKind, ...], stage: int) -> bool:
        return any((kind, _way(compute, stages), stage, compute.microbatch) in done for kind in kinds)

    if compute.kind is F:
        return compute.stage == 0 or has((F,), compute.stage - 1)
    if compute.kind is W:
        return has((I,), compute.stage)
    return has((F,), compute.stage) and (compute.stage + 1 == stages.count or has((B, I), compute.stage + 1))


def _draw(ready: list[Compute], made: Counter, draw: random.Random) -> Work:
    pairs = []
    for two in combinations(ready, 2):
        first, second = sorted(two, key=lambda compute: [F, B, I, W].index(compute.kind))
        if (first.kind, second.kind) in PAIRS and (first.slot, first.microbatch) != (second.slot, second.microbatch):
            pairs.append(Pair(first, second))
    chance = draw.random()
    if pairs and chance < 0.5:
        draw.shuffle(pairs)
        return min(pairs, key=lambda pair: made[pair.first.kind, pair.second.kind])
    single = draw.choice(ready)
    return SplitAction(single) if chance > 0.7 and single.kind is not W else single
