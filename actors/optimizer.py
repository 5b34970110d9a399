"""ZeRO-1 AdamW over flat buckets: working weights and gradients on every holder, FP32 master weights on the owners.

A step has two halves. `reduce` sums gradients and takes their norm; nothing persistent changes. `apply` updates the owned
shards and republishes the working weights; it runs only once the step is committed. All owners of a shard see the same
bits and do the same arithmetic, so copies of state stay equal without being copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actors.comm.groups import Generation, Group
from actors.model.weights import Weight, exact_dtype, initial_value
from orchestrator.config import OptimizerSection
from orchestrator.ownership import Bucket


@dataclass(slots=True)
class OwnedShard:
    """State of one shard: flat master weights; AdamW keeps its moments for them."""

    bucket: Bucket
    shard: int
    master: torch.Tensor
    adam: torch.optim.AdamW

    def moment(self, kind: str) -> torch.Tensor:
        """`exp_avg` or `exp_avg_sq`, zeros before the first update."""
        state = self.adam.state[self.master]
        return state[kind] if kind in state else torch.zeros_like(self.master)

    def set_moments(self, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, steps: int) -> None:
        step = torch.tensor(float(steps), device=self.master.device)  # fused AdamW wants it beside the moments
        self.adam.state[self.master] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


class BucketBuffers:
    """Flat buffers of one bucket on one member. Ranks that only own hold gradients, but no working weights."""

    def __init__(self, bucket: Bucket, rank: int, dtype: torch.dtype, device: torch.device):
        self.bucket, self.rank = bucket, rank
        exact = exact_dtype(dtype)
        length = bucket.shard_size * len(bucket.owners)
        self.gradient = torch.zeros(length, dtype=exact, device=device)
        self.holds = rank in bucket.holders
        working = exact if bucket.precise else dtype
        self.working = torch.zeros(length if self.holds else 0, dtype=working, device=device)

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
    """All buckets of one rank in one generation."""

    def __init__(self, rank: int, buckets: tuple[Bucket, ...], settings: OptimizerSection, dtype: torch.dtype,
                 device: torch.device):
        self._rank, self._settings, self._device = rank, settings, device
        self._buffers = [BucketBuffers(b, rank, dtype, device) for b in buckets if rank in b.members]
        self.shards = [self._owned(buffers, shard) for buffers in self._buffers for shard in buffers.bucket.shards_of(rank)]
        self.weights: dict[str, Weight] = {}
        for buffers in self._buffers:
            self.weights.update(buffers.weights())
        self.gradient_norm = 0.0

    @staticmethod
    def groups(buckets: tuple[Bucket, ...]) -> list[tuple[int, ...]]:
        """Process groups that the buckets need, in the order every rank makes them."""
        return [ranks for b in buckets for ranks in (tuple(sorted(b.members)), tuple(sorted(b.holders)))]

    def initialise(self, seed: int, std: float) -> None:
        """Fill the owned master weights with their initial values, the same on any layout."""
        for owned in self.shards:
            for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
                whole = initial_value(spec.name, spec.shape, seed, std).flatten()
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

    def apply(self, groups: Generation, learning_rate: float) -> None:
        """Update owned shards with the reduced gradients, then publish the new working weights. Raises Aborted."""
        clip = min(1.0, self._settings.clip_norm / (self.gradient_norm + 1e-6))
        by_bucket = {buffers.bucket.index: buffers for buffers in self._buffers}
        for owned in self.shards:
            buffers = by_bucket[owned.bucket.index]
            owned.master.grad = buffers.shard(buffers.gradient, owned.shard) * clip
            owned.adam.param_groups[0]["lr"] = learning_rate
            owned.adam.step()
            owned.master.grad = None
        self.publish(groups)

    def publish(self, groups: Generation) -> None:
        """Rebuild every holder's working weights from the primary owners' master shards. Raises Aborted."""
        for buffers in self._buffers:
            if not buffers.holds:
                continue
            bucket, mine = buffers.bucket, None
            for owned in self.shards:
                if owned.bucket is bucket and bucket.owners[owned.shard][0] == self._rank:
                    mine = buffers.shard(buffers.working, owned.shard)
                    mine.copy_(owned.master)
            groups.group(tuple(sorted(bucket.holders))).all_gather(buffers.working, mine)

    def _owned(self, buffers: BucketBuffers, shard: int) -> OwnedShard:
        settings, bucket = self._settings, buffers.bucket
        master = torch.zeros(bucket.shard_size, dtype=buffers.gradient.dtype, device=buffers.gradient.device)
        adam = torch.optim.AdamW(
            [master], lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
            weight_decay=settings.weight_decay if bucket.decay else 0.0, fused=True)
        return OwnedShard(bucket, shard, master, adam)


def owned_by_name(shards: list[OwnedShard]) -> Mapping[str, list[tuple[OwnedShard, int, int, int]]]:
    """Name of a weight -> (shard, start, stop, offset) for every range of it that these shards hold."""
    found: dict[str, list[tuple[OwnedShard, int, int, int]]] = {}
    for owned in shards:
        for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
            found.setdefault(spec.name, []).append((owned, start, stop, offset))
    return found
