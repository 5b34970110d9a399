"""The training step of the peers: plain PyTorch, data parallel, one process per worker, on the bench's own model and text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
import yaml

from actors.data.batching import Batch
from actors.runtime.process_setup import settle
from jobs.benches.recovery.journal import StepJournal, WorkerStep
from jobs.benches.shared.plain import PlainTraining
from jobs.benches.shared.text import batches_of_text
from orchestrator.config.run_config import parse

_DISTINCT_BATCHES = 8  # the text repeats: what it says does not matter here


class PeerTraining:
    """One worker. Every worker holds the whole model and the whole optimizer, as data parallelism has it."""

    def __init__(self, config: str, journal: str):
        """`config`: a run configuration as YAML. `journal`: path of the StepJournal."""
        settle()
        self._training = PlainTraining(parse(yaml.safe_load(config)))
        self._batches = batches_of_text(self._training.config, _DISTINCT_BATCHES)
        self._journal = StepJournal(journal)

    def compute(self, step: int, share: int, shares: int) -> None:
        """Forward and backward over one of `shares` parts of the global batch of `step`."""
        batch = self._batches[step % _DISTINCT_BATCHES]
        tokens = numpy.ascontiguousarray(batch.tokens[share::shares])
        self._training.accumulate(Batch(step, tokens, batch.valid[share::shares]), batch.divisors)

    def exchange(self, add: Callable[[torch.Tensor], None]) -> None:
        """Sum gradients and loads of experts over workers. `add` sums a flat tensor in place."""
        parts = [p.grad for p in self._training.model.parameters()] + list(self._training.model.counts.values())
        flat = torch.cat([part.flatten().to(parts[0].dtype) for part in parts])
        add(flat)
        for part, summed in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(summed.view_as(part))

    def update(self, step: int) -> None:
        self._training.update(step)

    def done(self, step: int, began: float, rank: int, size: int, sequences: int) -> None:
        self._journal.write(WorkerStep(os.getpid(), rank, size, step, sequences, began, time.monotonic()))

    @property
    def sequences(self) -> int:
        """Of the whole batch."""
        return self._training.config.training.batch_sequences

    def state(self) -> dict[str, Any]:
        """Weights, moments, gate biases."""
        return {"model": dict(self._training.model.named), "optimizer": self._training.adam.state_dict(),
                "biases": dict(self._training.model.biases)}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self._training.model.named.items():
                parameter.copy_(state["model"][name])
            for layer, bias in self._training.model.biases.items():
                bias.copy_(state["biases"][layer])
        self._training.adam.load_state_dict(state["optimizer"])
