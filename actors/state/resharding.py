"""Persistent state on its way from rank to rank, when it changes owners: master weights, AdamW's moments and how many updates
they have seen, and the biases of gates. What goes where is a plan (orchestrator/state/transfer.py) that all ranks have alike.

Everything that one rank has for another is one message. All receives are posted before anything is sent, so that both directions
of a link are used at once. What a rank had stays as it is until it is let go of: a move that fails has changed nothing there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from actors.comm.groups import Group, wait
from actors.comm.waiting import GroupOperation
from actors.state.optimizer import OwnedShard
from orchestrator.state.transfer import Message, TransferPlan

_TAG = 1  # nothing else is sent from one to one in the group of all ranks
_HEADER = 1  # a message begins with the number of updates, which FP32 holds exactly up to 2**24

Biases = Mapping[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Carried:
    """Bytes that a rank sent and received."""

    sent: int
    received: int


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    message: Message
    buffer: torch.Tensor
    work: GroupOperation


def carry_over(plan: TransferPlan, rank: int, world: Group, former: Sequence[OwnedShard], shards: Sequence[OwnedShard],
               former_biases: Biases, biases: Biases) -> Carried:
    """Fill what a rank owns from now on. Collective.

    Args:
        world: all ranks of the new ownership, in order.
        former: what it owned, not changed here. shards: what it owns now, as `optimizer.shards_of` makes them of `former`: those
            that are the same are left alone, the others get all their values.
        former_biases, biases: by layer. Those that arrive are written into `biases`, which has the others already.
    Raises Aborted: aborted, timed out, or a peer is gone. Then `shards` and `biases` are worthless, `former` is as it was.
    """
    kept = {id(owned.master) for owned in former}
    fresh = [owned for owned in shards if id(owned.master) not in kept]
    filled = {id(owned): (owned.master, _for_values(owned), _for_values(owned)) for owned in fresh}
    target = _Ranges([(owned, filled[id(owned)]) for owned in fresh])
    source = _Ranges([(owned, (owned.master, owned.moment("exp_avg"), owned.moment("exp_avg_sq"))) for owned in former])
    steps = former[0].steps if former else 0

    arriving = [_receive(world, peer, message, plan, shards[0].master) for (peer, to), message in plan.messages.items()
                if to == rank]
    leaving = [_send(world, peer, message, _packed(message, plan, source, former_biases, steps, former[0].master))
               for (origin, peer), message in plan.messages.items() if origin == rank]
    for piece in plan.kept[rank]:
        if piece.name in target:
            _copy(target.find(piece.name, piece.start, piece.stop), source.find(piece.name, piece.start, piece.stop))
    received = sum(one.buffer.nbytes for one in arriving)
    while arriving:
        one = arriving.pop(0)  # and with it its buffer, once it is unpacked
        wait(one.work)
        steps = _unpack(one, plan, target, biases)
    for owned in fresh if steps else ():
        owned.set_moments(*filled[id(owned)][1:], steps)
    for one in leaving:
        wait(one.work)
    return Carried(sum(one.buffer.nbytes for one in leaving), received)


def _for_values(owned: OwnedShard) -> torch.Tensor:
    """A flat tensor in which only what pads the bucket is zero yet: the rest is going to be filled."""
    flat = torch.empty_like(owned.master)
    used = sum(stop - start for _, start, stop, _ in owned.bucket.pieces(owned.shard))
    flat[used:] = 0
    return flat


class _Ranges:
    """Flat tensors of shards (master weights and both moments) by the ranges of weights in them."""

    def __init__(self, shards: Collection[tuple[OwnedShard, tuple[torch.Tensor, ...]]]):
        self._by_name: dict[str, list[tuple[int, int, int, tuple[torch.Tensor, ...]]]] = {}
        for owned, flats in shards:
            for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
                self._by_name.setdefault(spec.name, []).append((start, stop, offset, flats))

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def find(self, name: str, first: int, last: int) -> tuple[torch.Tensor, ...] | None:
        """The range [first, last) of a weight, which is in one shard; None: it is in none."""
        for start, stop, offset, flats in self._by_name[name]:
            if start <= first and last <= stop:
                return tuple(flat[offset + first - start : offset + last - start] for flat in flats)
        return None


def _copy(to: tuple[torch.Tensor, ...] | None, values: tuple[torch.Tensor, ...]) -> None:
    for flat, value in zip(to or (), values):
        flat.copy_(value)


def _receive(world: Group, peer: int, message: Message, plan: TransferPlan, like: torch.Tensor) -> _OnItsWay:
    buffer = like.new_empty(_HEADER + message.length(plan.gate_values))
    return _OnItsWay(message, buffer, world.receive(buffer, peer, _TAG))


def _send(world: Group, peer: int, message: Message, buffer: torch.Tensor) -> _OnItsWay:
    return _OnItsWay(message, buffer, world.send(buffer, peer, _TAG))


def _packed(message: Message, plan: TransferPlan, source: _Ranges, biases: Biases, steps: int, like: torch.Tensor) -> torch.Tensor:
    buffer = like.new_empty(_HEADER + message.length(plan.gate_values))
    buffer[0] = steps
    parts = [flat for one in message.weights for flat in source.find(one.name, one.start, one.stop)]
    parts += [biases[gate.layer] for gate in message.gates]
    torch.cat(parts, out=buffer[_HEADER:])
    return buffer


def _unpack(one: _OnItsWay, plan: TransferPlan, target: _Ranges, biases: Biases) -> int:
    """The number of updates."""
    flats = [flat for transfer in one.message.weights for flat in target.find(transfer.name, transfer.start, transfer.stop)]
    flats += [biases[gate.layer] for gate in one.message.gates]
    for flat, values in zip(flats, one.buffer[_HEADER:].split([flat.numel() for flat in flats]), strict=True):
        flat.copy_(values)
    return int(one.buffer[0])
