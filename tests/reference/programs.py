"""Programs run against each other with self-describing tensors over links without tags.

Nothing here knows the rules of dependencies: each payload says what it is, and whoever uses one looks whether it is the right
one. Of the pipeline it knows the paths of microbatches only.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque

from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Payload, Reduce, SplitAction

BACKWARDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


class Wrong(Exception):
    """Something is not what it says."""


class Twin:
    """One position. room: tensors that a link takes before their receive is posted; outstanding: receives that it can have
    posted whose tensor is not there; None: any number."""

    def __init__(self, program, stages, twins, links, room=None, outstanding=None):
        self.at, self.stages, self.twins, self.links = program.position, stages, twins, links
        self.room, self.outstanding = room, outstanding
        self.todo = deque(program.actions)
        self.made, self.inbox, self.posted = {}, {}, defaultdict(deque)
        self.forwards, self.inputs, self.weights = [], set(), []
        self.reduced = None

    def path(self, slot):
        """(number of the path, its places) that passes this position in `slot`."""
        found = [(number, path) for number, path in enumerate(self.stages.paths) if (self.at, slot) in path]
        if not found:
            raise Wrong(f"position {self.at} has no slot {slot}")
        return found[0]

    def take_in(self):
        for peer, posted in self.posted.items():
            while posted and self.links[peer, self.at]:
                self.inbox[posted.popleft()] = self.links[peer, self.at].popleft()

    def advance(self):
        """Run one action; False: it has to wait."""
        self.take_in()
        action = self.todo[0]
        if isinstance(action, Compute | Pair | SplitAction):
            if any(self.waits(compute) for compute in action.computes):
                return False
            for compute in action.computes:
                self.compute(compute)
        elif isinstance(action, Reduce):
            self.reduced = sorted(self.weights)
        elif action.kind is ActionKind.RECEIVE:
            missing = sum(map(len, self.posted.values()))
            if self.outstanding is not None and missing >= self.outstanding:
                return False
            self.posted[action.peer].append((action.payload, action.slot, action.microbatch))
        elif not self.send(action):
            return False
        self.todo.popleft()
        return True

    def send(self, action):
        key, way = (action.payload, action.slot, action.microbatch), (self.at, action.peer)
        if key not in self.made:
            raise Wrong(f"nothing to send: {action}")
        waiting = len(self.twins[action.peer].posted[self.at]) if 0 <= action.peer < len(self.twins) else 0
        if self.room is not None and len(self.links[way]) >= waiting + self.room:
            return False
        self.links[way].append(self.made.pop(key))
        return True

    def outer(self, compute):
        """The tensor that another stage makes for this action: (its key here, the place that makes it)."""
        _, path = self.path(compute.slot)
        stage = path.index((self.at, compute.slot))
        if compute.kind is ActionKind.FORWARD and stage > 0:
            return (Payload.ACTIVATION, compute.slot, compute.microbatch), path[stage - 1]
        if compute.kind in BACKWARDS and stage < len(path) - 1:
            return (Payload.GRADIENT, compute.slot, compute.microbatch), path[stage + 1]
        return None

    def waits(self, compute):
        outer = self.outer(compute)
        if outer is None or outer[0] in self.inbox:
            return False
        key, (maker, _) = outer
        if maker == self.at or not any(key in posted for posted in self.posted.values()):
            raise Wrong(f"{compute}: not made here, or no receive posted")
        return True

    def hand_on(self, payload, compute, path, stage, target):
        """Give what `compute` of `stage` has made to the stage `target`."""
        tensor = (payload, target, self.path(compute.slot)[0], compute.microbatch)
        position, slot = path[target]
        if position == self.at:
            self.inbox[payload, slot, compute.microbatch] = tensor
        else:
            self.made[payload, compute.slot, compute.microbatch] = tensor

    def compute(self, compute):
        number, path = self.path(compute.slot)
        stage, name = path.index((self.at, compute.slot)), (compute.slot, compute.microbatch)
        if compute.stage != stage:
            raise Wrong(f"{compute}: elsewhere")
        outer = self.outer(compute)
        if outer and self.inbox.pop(outer[0]) != (outer[0][0], stage, number, compute.microbatch):
            raise Wrong(f"{compute}: another tensor")
        if compute.kind is ActionKind.FORWARD:
            if name in self.forwards:
                raise Wrong(f"{compute}: again")
            self.forwards.append(name)
            if stage + 1 < len(path):
                self.hand_on(Payload.ACTIVATION, compute, path, stage, stage + 1)
        elif compute.kind is ActionKind.BACKWARD_WEIGHT:
            if name not in self.inputs:
                raise Wrong(f"{compute}: no input gradient")
            self.inputs.remove(name)
            self.weights.append(name)
        else:
            self.backward(compute, path, stage, name)

    def backward(self, compute, path, stage, name):
        if name not in self.forwards:
            raise Wrong(f"{compute}: no forward")
        if name in self.weights or name in self.inputs:
            raise Wrong(f"{compute}: again")
        if stage > 0:
            self.hand_on(Payload.GRADIENT, compute, path, stage, stage - 1)
        if compute.kind is ActionKind.BACKWARD:
            self.weights.append(name)
        else:
            self.inputs.add(name)


def works(programs, schedule, *, seed=0, room=None, outstanding=None):
    """Whether the programs end, in a random interleaving, with every microbatch forward at every stage, in training every
    gradient there once before the reduction, and nothing left on a link."""
    stages, trains = schedule.stages, schedule.trains
    links, rng, twins = defaultdict(deque), random.Random(seed), []
    twins += [Twin(program, stages, twins, links, room, outstanding) for program in programs]
    each = schedule.microbatches // len(stages.paths)
    waiting = set()
    try:
        while running := [twin for twin in twins if twin.todo]:
            ready = [twin for twin in running if twin.at not in waiting]
            if not ready:
                return False
            twin = rng.choice(ready)
            if twin.advance():
                waiting.clear()
            else:
                waiting.add(twin.at)
    except Wrong:
        return False
    for twin in twins:
        twin.take_in()
        everything = sorted({(slot, m) for path in stages.paths for at, slot in path if at == twin.at for m in range(each)})
        if sorted(twin.forwards) != everything or twin.reduced != (everything if trains else None) or twin.made:
            return False
    return not any(links.values())
