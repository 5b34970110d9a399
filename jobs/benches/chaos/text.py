"""What the runs of the chaos bench read, and the run that nothing befalls."""

from __future__ import annotations

import contextlib
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pyarrow

from actors.data.batching import Batch
from actors.data.dataset import Dataset, DatasetError, Split
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from jobs import tokenize
from jobs.benches.chaos.company import CONFIG, LENGTH
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.data import order
from orchestrator.layout.layout import choose
from orchestrator.topology import Node

OVERRIDES = {
    "layout": {"pipeline": 2, "expert": "auto", "data": "auto"},  # all six, and less as they go
    "elastic": {"stuck_seconds": 2.0, "min_nodes": 3},
}
_MEMORY = "/dev/shm"  # where a line of a ledger is durable at once, for what that is worth


def undisturbed(folder: Path, steps: int, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of the same run on one rank, whose microbatches are large. sections: what differs from CONFIG."""
    dataset, told = tokens(folder), []
    lone = {"layout": {"pipeline": 1, "expert": 1, "data": 1}, "checkpoint": {"every": 0}, "placement": {"every": 0},
            "elastic": {"min_nodes": 1, "copies": 0},
            "training": {"microbatch_sequences": 8, "validate_every": 0, "validation_sequences": 0}}
    with tempfile.TemporaryDirectory(prefix="dualray-chaos-", dir=_MEMORY) as runs:
        config = configured(dataset, runs, "undisturbed", {key: lone.get(key, {}) | sections.get(key, {})
                                                          for key in {*lone, *sections}})
        layout = choose((Node("lone", 1),), config.layout, config.model, config.stages)

        def watch(kind: str, values: dict[str, Any]) -> None:
            if kind == "step" and len(told) < steps:
                told.append(values)
                if len(told) == steps:
                    trainer.stop()
        with ProcessRanks(config, 1, start_method="forkserver") as ranks:
            sources, ran = Text(config, dataset).sources(), RunFolder(runs, config.run.name)
            trainer = Trainer(config, layout, ranks, ran, sources, watch=watch)
            trainer.run()
    return told


def tokens(folder: Path) -> Dataset:
    """The data of all runs: a few files of the standard library, made once. In this process: to start Ray for it takes longer
    than the work, or a minute in vain where the machine is busy."""
    path = folder / "tokens"
    with contextlib.suppress(DatasetError):
        return Dataset.open(str(path))
    inputs = sorted(str(found) for found in Path(sysconfig.get_path("stdlib")).glob("c*.py"))
    config = parse({"data": {"sequence_length": LENGTH, "validation_fraction": 0.2}}, [])
    with patch.object(tokenize, "_ray", contextlib.nullcontext), patch.object(tokenize, "_tables", _tables):
        return tokenize.tokenize(inputs, tokenize.load_tokenizer("byte"), str(path), config)


def _tables(reader: Callable[[pyarrow.Table], Iterator[pyarrow.Table]], rows: list[dict[str, Any]]) -> Iterator[pyarrow.Table]:
    for row in rows:
        yield from reader(pyarrow.Table.from_pylist([row]))


def configured(dataset: Dataset, runs: str, name: str, sections: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    tree = {key: {**value, **OVERRIDES.get(key, {}), **sections.get(key, {})} for key, value in CONFIG.items()}
    return parse(tree | {"run": {"name": name, "directory": runs}, "data": {"sequence_length": LENGTH, "path": dataset.path}}, [])


class Text:
    """All of it in memory, dealt in the run's own order: reading from storage is not what is struck here."""

    def __init__(self, config: RunConfig, dataset: Dataset):
        self._config, self._dataset = config, dataset
        self._rows = dataset.read_rows(dataset.train, range(dataset.train.sequences))

    def sources(self) -> Sources:
        return Sources(lambda step: _TextFeed(self, step), self._held_out)

    def batch(self, step: int) -> Batch:
        training, split = self._config.training, self._dataset.train
        first, count = order.first_position(training, step), order.batch_size(training, step)
        rows = order.sequences_of(split.shape, self._config.run.seed, self._config.data.shuffle_window, first, count)
        return Batch(step, numpy.ascontiguousarray(self._rows[rows]), self._dataset.valid_tokens(split, rows))

    def _held_out(self) -> Batch | None:
        split: Split = self._dataset.validation
        rows = range(min(self._config.training.validation_sequences, split.sequences))
        return Batch(-1, self._dataset.read_rows(split, rows), self._dataset.valid_tokens(split, rows)) if rows else None


@dataclass
class _TextFeed:
    text: Text
    step: int

    def next(self) -> Batch:
        self.step += 1
        return self.text.batch(self.step - 1)

    def close(self) -> None:
        pass
