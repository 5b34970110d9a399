"""ZeRO-1 AdamW over flat buckets: working weights and gradients on every holder, FP32 master weights on the owners.

A step has two halves. `reduce` sums gradients and takes their norm; nothing persistent changes. `update` changes the owned
shards, and `publish` makes working weights of them; that is done only once the step is committed. All owners of a shard see the same
bits and do the same arithmetic, so copies of state stay equal without being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.optim.adamw import adamw

from actors.comm.groups import Generation, Group
from actors.model.weights import Weight, exact_dtype
from orchestrator.config.run_config import OptimizerSection
from orchestrator.model.parameters import ParameterSpec
from orchestrator.state.ownership import Bucket


@dataclass(slots=True)
class OwnedShard:
    """State of one shard: flat master weights; AdamW's moments, from step to step in the dtype `kept`; `steps`: its updates."""

    bucket: Bucket
    shard: int
    master: torch.Tensor
    kept: torch.dtype
    steps: int = 0
    _moments: tuple[torch.Tensor, torch.Tensor] | None = None

    def moment(self, kind: str) -> torch.Tensor:
        """`exp_avg` or `exp_avg_sq` in the dtype of the masters, zeros before the first update."""
        return self._exact()[kind == "exp_avg_sq"]

    def set_moments(self, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, steps: int) -> None:
        self._moments, self.steps = (exp_avg.to(self.kept), exp_avg_sq.to(self.kept)), steps

    def forget(self) -> None:
        """As before the first update."""
        self._moments, self.steps = None, 0

    def update(self, gradient: torch.Tensor, learning_rate: float, settings: OptimizerSection) -> None:
        """One step of AdamW. torch's function, not its class: that imports torch._dynamo, which takes a new process seconds."""
        exp_avg, exp_avg_sq = self._exact()
        count = torch.tensor(float(self.steps), device=self.master.device)  # the fused kernel wants it beside the moments
        adamw([self.master], [gradient], [exp_avg], [exp_avg_sq], [], [count], fused=True, amsgrad=False, beta1=settings.beta1,
              beta2=settings.beta2, lr=learning_rate, eps=settings.epsilon, maximize=False,
              weight_decay=settings.weight_decay if self.bucket.decay else 0.0)
        self.set_moments(exp_avg, exp_avg_sq, self.steps + 1)

    def _exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._moments is None:
            return torch.zeros_like(self.master), torch.zeros_like(self.master)
        first, second = self._moments
        return first.to(self.master.dtype), second.to(self.master.dtype)


class BucketBuffers:
    """Flat buffers of one bucket on one member. Ranks that only own hold gradients, but no working weights.

    former: of a bucket with the same weights, whose buffers are taken over with what is in them.
    """

    def __init__(self, bucket: Bucket, rank: int, dtype: torch.dtype, device: torch.device, former: BucketBuffers | None = None):
        self.bucket, self.rank, self.holds = bucket, rank, rank in bucket.holders
        exact = exact_dtype(dtype)
        length = bucket.shard_size * len(bucket.owners)
        gradient, working = (former.gradient, former.working) if former else (None, None)
        self.gradient = _flat(length, exact, device, gradient, bucket.size)
        self.working = _flat(length if self.holds else 0, exact if bucket.precise else dtype, device, working, bucket.size)

    def weights(self) -> dict[str, Weight]:
        found, at = {}, 0
        for spec in self.bucket.specs if self.holds else ():
            value, gradient = (flat[at : at + spec.size].view(spec.shape) for flat in (self.working, self.gradient))
            found[spec.name] = Weight(spec.name, value, gradient)
            at += spec.size
        return found

    def shard(self, flat: torch.Tensor, shard: int) -> torch.Tensor:
        return flat[shard * self.bucket.shard_size : (shard + 1) * self.bucket.shard_size]


class Optimizer:
    """All buckets of one rank in one generation.

    shards: state of this ownership, as `shards_of` lists it; None: new. former: an optimizer of this rank before, in another
    ownership; buffers of buckets with the same weights are taken from it, and it is of no use afterwards.
    """

    def __init__(self, rank: int, buckets: tuple[Bucket, ...], settings: OptimizerSection, dtype: torch.dtype,
                 device: torch.device, shards: list[OwnedShard] | None = None, former: Optimizer | None = None):
        self._rank, self._settings, self._device = rank, settings, device
        exact = exact_dtype(dtype)
        self.shards = shards_of(rank, buckets, settings, exact, device) if shards is None else shards
        mine = [bucket for bucket in buckets if rank in bucket.members]
        taken = former._give_up({bucket.specs for bucket in mine}) if former else {}
        self._buffers = [BucketBuffers(b, rank, dtype, device, taken.pop(b.specs, None)) for b in mine]
        self.weights: dict[str, Weight] = {}
        for buffers in self._buffers:
            self.weights.update(buffers.weights())
        self.gradient_norm = 0.0

    @staticmethod
    def groups(buckets: tuple[Bucket, ...]) -> list[tuple[int, ...]]:
        """Process groups that the buckets need, in the order every rank makes them."""
        return [ranks for b in buckets for ranks in (tuple(sorted(b.members)), tuple(sorted(b.holders)))]

    def initialise(self, value_of: Callable[[ParameterSpec], torch.Tensor]) -> None:
        """The owned state before the first update. value_of: a whole weight, the same on any layout."""
        for owned in self.shards:
            owned.forget()
            for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
                whole = value_of(spec).flatten()
                owned.master[offset : offset + stop - start] = whole[start:stop].to(owned.master)

    def zero_gradients(self) -> None:
        for buffers in self._buffers:
            buffers.gradient.zero_()

    def reduce(self, groups: Generation, world: Group) -> None:
        """Sum gradients over the members of every bucket, then take the global norm. Raises Aborted."""
        squares = torch.zeros(1, dtype=torch.float64, device=self._device)
        for buffers in self._buffers:
            bucket = buffers.bucket
            groups.group(tuple(sorted(bucket.members))).all_reduce(buffers.gradient)
            for shard in bucket.shards_of(self._rank):
                if bucket.owners[shard][0] == self._rank:
                    squares += buffers.shard(buffers.gradient, shard).double().square().sum()
        world.all_reduce(squares)
        self.gradient_norm = float(squares.sqrt())

    def update(self, learning_rate: float) -> None:
        """Update owned shards with the reduced gradients, alone; the working weights are to be published."""
        clip = min(1.0, self._settings.clip_norm / (self.gradient_norm + 1e-6))
        by_bucket = {buffers.bucket.index: buffers for buffers in self._buffers}
        for owned in self.shards:
            buffers = by_bucket[owned.bucket.index]
            owned.update(buffers.shard(buffers.gradient, owned.shard) * clip, learning_rate, self._settings)

    def publish(self, groups: Generation, only: Collection[int] | None = None) -> None:
        """Rebuild every holder's working weights from the primary owners' master shards. Raises Aborted.

        only: indexes of the buckets for which to do so; the same on all ranks.
        """
        primary = {owned.bucket.index: owned for owned in self.shards if owned.bucket.owners[owned.shard][0] == self._rank}
        for buffers in self._buffers:
            if buffers.holds and (only is None or buffers.bucket.index in only):
                owned = primary[buffers.bucket.index]
                mine = buffers.shard(buffers.working, owned.shard)
                mine.copy_(owned.master)
                groups.group(tuple(sorted(buffers.bucket.holders))).all_gather(buffers.working, mine)

    def _give_up(self, wanted: Collection[tuple[ParameterSpec, ...]]) -> dict[tuple[ParameterSpec, ...], BucketBuffers]:
        """Buffers by their bucket's weights, if these are wanted. All else is let go of."""
        found = {buffers.bucket.specs: buffers for buffers in self._buffers if buffers.bucket.specs in wanted}
        self._buffers, self.shards, self.weights = [], [], {}
        return found


def shards_of(rank: int, buckets: Iterable[Bucket], settings: OptimizerSection, exact: torch.dtype, device: torch.device,
              former: Sequence[OwnedShard] = ()) -> list[OwnedShard]:
    """What a rank owns, bucket by bucket: shards with the same content as one of `former` are that one, others are zeros."""
    before = {_content(owned.bucket, owned.shard): owned for owned in former}
    found = []
    for bucket in buckets:
        for shard in bucket.shards_of(rank):
            same = before.pop(_content(bucket, shard), None) if before else None
            found.append(replace(same, bucket=bucket, shard=shard) if same else _zeros(bucket, shard, settings, exact, device))
    return found


def _zeros(bucket: Bucket, shard: int, settings: OptimizerSection, exact: torch.dtype, device: torch.device) -> OwnedShard:
    master = torch.zeros(bucket.shard_size, dtype=exact, device=device)
    return OwnedShard(bucket, shard, master, torch.bfloat16 if settings.moments == "bf16" else exact)


def _content(bucket: Bucket, shard: int) -> tuple:
    """Two shards with the same are interchangeable."""
    return bucket.shard_size, tuple((spec.name, start, stop) for spec, start, stop, _ in bucket.pieces(shard))


def _flat(length: int, dtype: torch.dtype, device: torch.device, former: torch.Tensor | None, size: int) -> torch.Tensor:
    """Zeros [length]; or what is in `former`, of which the first `size` count: itself where it is as long. One of another dtype is
    of no use: what is in it is of another run."""
    if former is not None and former.dtype != dtype:
        former = None
    if former is not None and former.numel() == length:
        return former
    found = torch.zeros(length, dtype=dtype, device=device)
    if former is not None and former.numel() and length:
        found[:size] = former[:size]
    return found


def owned_by_name(shards: Iterable[OwnedShard]) -> Mapping[str, list[tuple[OwnedShard, int, int, int]]]:
    """Name of a weight -> (shard, start, stop, offset) for every range of it that these shards hold."""
    found: dict[str, list[tuple[OwnedShard, int, int, int]]] = {}
    for owned in shards:
        for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
            found.setdefault(spec.name, []).append((owned, start, stop, offset))
    return found
