"""One rank's part in timing a re-placement: the experts' state (master weights and both moments) as a run holds it, moved from
one placement to another and back; and, for comparison, the same bytes between the same ranks without anything around them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actors.comm.groups import Group, wait
from actors.state.optimizer import OwnedShard, shards_of
from actors.state.resharding import carry_over
from orchestrator.config.run_config import ModelConfig, OptimizerSection
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.state import ownership, transfer

COPIES = 1
_TAG, _UPDATES = 2, 7


@dataclass(frozen=True)
class MoveTask:
    """`repeats` times from the first placement to the second and back."""

    model: ModelConfig
    before: Placement
    after: Placement
    repeats: int


@dataclass(frozen=True)
class MoveFound:
    """What one rank saw. plan_seconds: computing what goes where. seconds: of every move, in turn there and back; stream: of the
    same bytes, right after it. right: all values were where they belong, after every move.

    bytes_moved, bytes_needed: of all ranks, on the way there.
    """

    plan_seconds: float
    seconds: list[float]
    stream: list[float]
    bytes_moved: int
    bytes_needed: int
    right: bool


def move(task: MoveTask, rank: int, layout: Layout, world: Group) -> MoveFound:
    """Collective."""
    owned_by = [_buckets(task.model, layout, placement) for placement in (task.before, task.after)]
    nodes = [place.node for place in layout.places]
    started = time.perf_counter()
    there, back = (transfer.plan(old, new, range(layout.size), nodes) for old, new in (owned_by, owned_by[::-1]))
    plan_seconds = (time.perf_counter() - started) / 2
    shards = _filled(_shards(rank, owned_by[0], ()))
    seconds, stream, right = [], [], True
    for turn in range(2 * task.repeats):
        plan, buckets = (back, owned_by[0]) if turn % 2 else (there, owned_by[1])
        _together(world)
        started = time.perf_counter()
        former, shards = shards, _shards(rank, buckets, shards)
        carry_over(plan, rank, world, former, shards, {}, {})
        seconds.append(time.perf_counter() - started)
        right = right and _is_filled(shards)
        stream.append(_streamed(plan, rank, world))
    return MoveFound(plan_seconds, seconds, stream, there.bytes_moved, there.bytes_needed, right)


def _streamed(plan: transfer.TransferPlan, rank: int, world: Group) -> float:
    """Seconds of as many bytes between the same ranks, in buffers that are there: receives first, then sends."""
    lengths = {ends: message.length(0) for ends, message in plan.messages.items() if rank in ends}
    buffers = {ends: torch.zeros(length) for ends, length in lengths.items()}
    _together(world)
    started = time.perf_counter()
    works = [world.receive(buffer, source, _TAG) for (source, target), buffer in buffers.items() if target == rank]
    works += [world.send(buffer, target, _TAG) for (source, target), buffer in buffers.items() if source == rank]
    for work in works:
        wait(work)
    return time.perf_counter() - started


def _together(world: Group) -> None:
    world.all_reduce(torch.zeros(1))


def _buckets(model: ModelConfig, layout: Layout, placement: Placement) -> tuple[ownership.Bucket, ...]:
    """Those of experts: of nothing else does the owner depend on the placement."""
    return tuple(bucket for bucket in ownership.buckets(model, layout, COPIES, placement=placement)
                 if bucket.specs[0].expert is not None)


def _shards(rank: int, buckets: tuple[ownership.Bucket, ...], former: list[OwnedShard] | tuple[()]) -> list[OwnedShard]:
    return shards_of(rank, buckets, OptimizerSection(), torch.float32, torch.device("cpu"), former)


def _filled(shards: list[OwnedShard]) -> list[OwnedShard]:
    for owned in shards:
        flats = [torch.zeros_like(owned.master) for _ in range(3)]
        for at, values in _expected(owned).items():
            for flat, value in zip(flats, values):
                flat[at : at + value.numel()] = value
        owned.master.copy_(flats[0])
        owned.set_moments(flats[1], flats[2], _UPDATES)
    return shards


def _is_filled(shards: list[OwnedShard]) -> bool:
    return all(owned.steps == _UPDATES and torch.equal(flat[at : at + value.numel()], value)
               for owned in shards for at, values in _expected(owned).items()
               for flat, value in zip((owned.master, owned.moment("exp_avg"), owned.moment("exp_avg_sq")), values))


def _expected(owned: OwnedShard) -> Mapping[int, list[torch.Tensor]]:
    """By offset in the shard: master weights and moments as functions of the weight's name and the element's number."""
    found = {}
    for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
        ramp = torch.arange(start, stop, dtype=torch.float32)
        found[offset] = [ramp + sum(spec.name.encode()) * kind for kind in (1, 2, 3)]
    return found
