"""The peer of the benchmarks: one training loop in plain PyTorch, alone or as data-parallel processes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist

from actors.calls.messages import LossDivisors
from actors.data.batching import Batch
from actors.model.plain import PlainModel
from actors.runtime.process_setup import settle
from actors.runtime.rank import DTYPES
from orchestrator.config.run_config import RunConfig
from orchestrator.plan.recipe import learning_rate


@dataclass
class PlainTraining:
    """Model and optimizer of one process."""

    config: RunConfig

    def __post_init__(self) -> None:
        settings = self.config.optimizer
        self.model = PlainModel(self.config.model, DTYPES[self.config.training.dtype], self.config.run.seed)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True)

    def accumulate(self, batch: Batch, divisors: LossDivisors) -> float:
        """Forward and backward over the batch in microbatches. Returns the next-token loss sum divided by its global count."""
        training, total = self.config.training, 0.0
        for parameter in self.model.parameters():  # an expert that no token chose has a gradient of zero, not none
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        for at in range(0, len(batch.valid), training.microbatch_sequences):
            part = slice(at, at + training.microbatch_sequences)
            tokens = torch.from_numpy(batch.tokens[part]).to(torch.int64)
            valid = torch.from_numpy(batch.valid[part]).to(torch.int64)
            next_token, mtp, balance = self.model.losses(tokens, valid)
            loss = next_token / divisors.next_token
            total += float(loss.detach())
            (loss + training.mtp_loss_weight * mtp / divisors.mtp
             + training.balance_loss_weight * balance / divisors.sequences).backward()
        return total

    def update(self, step: int) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.training.steps)
        self.adam.step()
        self.model.update_bias(self.config.training.bias_update_speed)


def reference(config: RunConfig, batches: list[Batch]) -> dict:
    """Train in this process: losses by step, final parameters and biases by name, loads by step and layer."""
    settle()
    training, losses, loads = PlainTraining(config), [], []
    for step, batch in enumerate(batches):
        losses.append(training.accumulate(batch, batch.divisors))
        loads.append({layer: count.tolist() for layer, count in training.model.load().items()})
        training.update(step)
    parameters = {name: p.detach().double().numpy() for name, p in training.model.named.items()}
    return {"losses": losses, "parameters": parameters, "loads": loads}


def data_parallel(config: RunConfig, batches: list[Batch], rank: int, size: int, port: int) -> list[float]:
    """One of `size` processes, each with its share of every batch. Returns the seconds of each step.

    Gradients are summed in one flat all-reduce, which is what DistributedDataParallel does with one bucket. Each process
    stays on a core of its own, as our ranks do.
    """
    settle()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    training, seconds = PlainTraining(config), []
    for step, batch in enumerate(batches):
        dist.barrier()
        started = time.perf_counter()
        mine = Batch(batch.step, numpy.ascontiguousarray(batch.tokens[rank::size]), batch.valid[rank::size])
        training.accumulate(mine, batch.divisors)
        _sum_over_processes(training.model)
        training.update(step)
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return seconds


def _sum_over_processes(model: PlainModel) -> None:
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    for count in model.counts.values():
        dist.all_reduce(count)
