"""The training loop: carries a run from its state to its last committed step, over any transport of ranks.

A step: deal the batch, one call per rank, wait for all answers (computed and reduced, nothing changed yet), write the
ledger line; the update is carried by the next call. Nothing here touches a tensor.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol

import torch.distributed as dist

from actors import checkpoint
from actors.dealing import Batch, Dealer
from actors.messages import Apply, Assignment, LossSums, StepReport
from actors.ranks import Pending, RankFailed, Ranks, call
from actors.run_folder import RunFolder
from actors.slow import SlowWatch
from actors.storage import StorageError
from actors.trace import trace_json
from orchestrator import order
from orchestrator.config import RunConfig, dump
from orchestrator.layout import Layout, Place
from orchestrator.ledger import LedgerLine, combine, digest_text, to_json
from orchestrator.placement import place_experts
from orchestrator.recipe import learning_rate
from orchestrator.schedule.spans import Figures, Span
from orchestrator.scheduling import programs_for

FORM_TIMEOUT_SECONDS = 180.0


class TrainingFailed(RuntimeError):
    """The run cannot go on. `str()` is one line."""


class Batches(Protocol):
    """Where batches come from: `next()` gives those of consecutive steps."""

    def next(self) -> Batch: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sources:
    """`training(first_step)` opens the batches from a step on; `validation()` gives the held-out batch, or None."""

    training: Callable[[int], Batches]
    validation: Callable[[], Batch | None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted`: it was asked to stop and has saved."""

    step: int
    interrupted: bool
    validation_loss: float | None


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that ranks are writing: the state after `step` steps."""

    step: int
    directory: str
    pieces: Pending
    since: float


class Trainer:
    """`watch(kind, values)` is told each step's metrics ("step"), its loads of experts by layer ("load"), and each event
    ("event").

    `store`: where the ranks meet, served by this process on `host`; none: one of the trainer's own.
    """

    def __init__(self, config: RunConfig, layout: Layout, ranks: Ranks, folder: RunFolder, sources: Sources,
                 host: str = "127.0.0.1", watch: Callable[[str, dict[str, Any]], None] = lambda kind, values: None,
                 store: dist.TCPStore | None = None):
        self._config, self._layout, self._ranks, self._folder = config, layout, ranks, folder
        self._sources, self._host, self._watch, self._store = sources, host, watch, store
        self._dealer = Dealer(config, layout)
        self._stop = threading.Event()
        self._generation = 0
        self._known: set[tuple[bool, int]] = set()
        self._saving: _Saving | None = None
        self._save_wanted = False
        self._pending: Apply | None = None
        self._validation: Batch | None = None
        self._change: dict[str, Any] | None = None
        self._traced: dict[int, list[Span]] = {}
        self._traced_places: dict[int, tuple[Place, ...]] = {}

    def stop(self) -> None:
        """Ask the loop to save and end after the step under way."""
        self._stop.set()

    def run(self) -> Outcome:
        """Train to the end, or until stopped. Raises TrainingFailed, RankFailed, StorageError, CheckpointError, DatasetError."""
        try:
            self._form()
            step = self._load()
            self._folder.write("config.yaml", dump(self._config))  # not before: a refused run leaves that of the last one
            return self._train(step)
        except BaseException:
            self._ranks.abort()
            raise
        finally:
            self._folder.close()

    # --- the way to the first step -------------------------------------------------------------------------------

    def _form(self) -> None:
        self._generation += 1
        if self._store is None:
            self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        address, prefix = (self._host, self._store.port), f"formation-{self._store.add('formations', 1)}"
        self._call("form", [(Assignment(self._generation, rank, self._layout, address, prefix),)
                            for rank in range(self._layout.size)], FORM_TIMEOUT_SECONDS)
        self._known.clear()
        self._slow = SlowWatch(self._config.model, self._layout)
        self._change = {"layout": _layout_record(self._layout), "schedule": self._config.schedule.model_dump(mode="json"),
                        "placement": _placement_record(self._config, self._layout)}
        self._event("generation", generation=self._generation, layout=self._layout.describe(), nodes=len(self._layout.nodes))

    def _load(self) -> int:
        """Initial state, or that of the newest checkpoint. Returns the first step to run."""
        checkpoint.clear_unfinished(self._folder.checkpoints)
        found = checkpoint.complete(self._folder.checkpoints)
        if not found:
            self._call("initialise", [()] * self._layout.size, FORM_TIMEOUT_SECONDS)
            if lost := self._folder.trim(0):
                self._event("started_over", reason="no checkpoint", steps_to_redo=lost)
            return 0
        directory = found[-1]
        manifest = checkpoint.read_manifest(directory)
        check_compatible(manifest, self._config, directory)
        self._call("restore", [(directory, manifest.pieces, manifest.step)] * self._layout.size, FORM_TIMEOUT_SECONDS)
        redone = self._folder.trim(manifest.step)
        self._event("resumed", step=manifest.step, checkpoint=directory, steps_to_redo=redone)
        return manifest.step

    # --- the loop ------------------------------------------------------------------------------------------------

    def _train(self, step: int) -> Outcome:
        training, losses = self._config.training, None
        batches = self._sources.training(step)
        try:
            while step < training.steps and not self._stop.is_set():
                self._one_step(step, batches.next())
                step += 1
                if self._due(step, training.validate_every) and step < training.steps:
                    self._validate(step)
                self._save_when_due(step)
            interrupted = step < training.steps
            if not interrupted:
                losses = self._validate(step)
            if self._saved_step() != step:
                self._save(step)
            self._collect_save(wait=True, last=True)
            return Outcome(step, interrupted, losses)
        finally:
            batches.close()

    def _one_step(self, step: int, batch: Batch) -> None:
        started = time.perf_counter()
        requests = self._dealer.requests(batch, self._pending, training=True,
                                         keep_spans=step in self._config.telemetry.trace_steps)
        self._teach(requests[0].microbatches, training=True)
        reports: list[StepReport] = self._call("step", [(request,) for request in requests])
        self._pending = None
        losses = _losses(sum((report.losses for report in reports), LossSums()), batch, self._config)
        self._refuse_not_finite(step, losses, reports)
        line = LedgerLine(step, self._generation, order.first_position(self._config.training, step), len(batch.valid),
                          digest_text(combine(report.digest for report in reports)), losses["loss"])
        self._folder.commit(to_json(line, self._change))
        self._change = None
        rate = learning_rate(self._config.optimizer, step, self._config.training.steps)
        self._pending = Apply(step, rate)
        self._publish(step, batch, losses, rate, reports, time.perf_counter() - started)
        for kind, details in self._slow.after(requests, reports):
            self._event(kind, step=step, **details)

    def _refuse_not_finite(self, step: int, losses: dict[str, float], reports: list[StepReport]) -> None:
        norm = reports[0].gradient_norm
        if all(map(math.isfinite, losses.values())) and math.isfinite(norm):
            return
        self._event("not_finite", step=step, gradient_norm=repr(norm), **{name: repr(value) for name, value in losses.items()})
        self._settle(step)
        raise TrainingFailed(f"step {step}: loss {losses['loss']}, gradient norm {norm}: not finite; no update was made, "
                             f"the weights are those after {step} steps")

    def _settle(self, step: int) -> None:
        """Keep what is committed when the run must end here: the state before `step`."""
        if step and self._saved_step() != step:
            self._save(step)
        self._collect_save(wait=True)

    def _publish(self, step: int, batch: Batch, losses: dict[str, float], rate: float, reports: list[StepReport],
                 seconds: float) -> None:
        tokens = int((batch.valid - 1).sum())
        mean = _mean(reports)
        values = {
            "step": step, "time": round(time.time(), 3), **losses, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "seconds": seconds, "overlap_ratio": mean.overlap_ratio, "bubble_ratio": mean.bubble_ratio,
            "exposed_comm_seconds": mean.exposed_communication_seconds, "generation": self._generation,
            "nodes": len(self._layout.nodes), "gradient_norm": reports[0].gradient_norm, "learning_rate": rate,
            "busiest_expert": _busiest(reports), "sequences": len(batch.valid), "compute_seconds": mean.compute_seconds,
            "communication_seconds": mean.communication_seconds, "rank_seconds": max(report.seconds for report in reports),
            "bytes_across_nodes": sum(report.exchanged.across for report in reports),
            "bytes_inside_nodes": sum(report.exchanged.inside for report in reports),
        }
        self._folder.metrics(values)
        self._watch("step", values)
        self._watch("load", {layer: load for report in reports for layer, load in report.load.items()})
        if reports[0].spans:
            self._traced[step] = [span for report in reports for span in report.spans]
            self._traced_places[step] = self._layout.places
            self._folder.write("trace.json", trace_json(self._traced, self._traced_places))

    # --- validation and checkpoints: between a committed step and the next ----------------------------------------

    def _validate(self, step: int) -> float | None:
        if self._validation is None:
            self._validation = self._sources.validation()
        if self._validation is None:
            return None
        self._apply()
        started = time.perf_counter()
        requests = self._dealer.requests(self._validation, None, training=False)
        self._teach(requests[0].microbatches, training=False)
        sums = sum(self._call("evaluate", [(request,) for request in requests]), LossSums())
        losses = _losses(sums, self._validation, self._config)
        self._event("validation", step=step, loss=losses["loss"], seconds=round(time.perf_counter() - started, 3))
        return losses["loss"]

    def _save_when_due(self, step: int) -> None:
        """Begin the checkpoint that is due, unless the one before is still being written: then it begins when that is done.
        Training waits for neither."""
        self._save_wanted |= self._due(step, self._config.checkpoint.every)
        self._collect_save(wait=False)
        if self._save_wanted and self._saving is None and step < self._config.training.steps:
            self._save(step)

    def _save(self, step: int) -> None:
        """Begin a checkpoint of the state after `step` steps; the writing goes on beside the training."""
        self._collect_save(wait=True)
        self._save_wanted = False
        self._apply()
        directory = checkpoint.folder(self._folder.checkpoints, step)
        self._call("snapshot", [(directory,)] * self._layout.size)
        self._saving = _Saving(step, directory, self._ranks.start("saved", [()] * self._layout.size), time.perf_counter())

    def _collect_save(self, *, wait: bool, last: bool = False) -> None:
        """Make a finished checkpoint count. One that failed is dropped and told; only the run's last one ends the run."""
        if self._saving is None or not (wait or self._saving.pieces.done()):
            return
        saving, self._saving = self._saving, None
        step, directory = saving.step, saving.directory
        try:
            found = saving.pieces.results(self._config.training.step_timeout_seconds)
            pieces = tuple(piece for of_rank in found for piece in of_rank)
            model = self._config.model.model_dump(mode="json")
            checkpoint.commit(directory, checkpoint.Manifest(step, model, self._config.training.dtype, pieces))
        except (RankFailed, checkpoint.CheckpointError) as error:
            with contextlib.suppress(StorageError):  # what is left of it does not count, and the next start clears it
                checkpoint.discard(directory)
            self._event("checkpoint_failed", step=step, reason=str(error))
            if last:
                raise TrainingFailed(f"no checkpoint of step {step}: {error}") from error
            return
        self._event("checkpoint", step=step, path=directory, seconds=round(time.perf_counter() - saving.since, 3))
        try:
            checkpoint.prune(self._folder.checkpoints, self._config.checkpoint.keep)
        except StorageError as error:
            self._event("checkpoint_not_deleted", reason=str(error))

    def _saved_step(self) -> int | None:
        """Step of the newest checkpoint, be it complete or being written."""
        if self._saving is not None:
            return self._saving.step
        found = checkpoint.complete(self._folder.checkpoints)
        return checkpoint.read_manifest(found[-1]).step if found else None

    def _apply(self) -> None:
        if self._pending is not None:
            self._call("apply", [(self._pending,)] * self._layout.size)
            self._pending = None

    # --- small things --------------------------------------------------------------------------------------------

    def _teach(self, microbatches: int, *, training: bool) -> None:
        """Ship each position's program the first time a number of microbatches comes up in this generation."""
        if (training, microbatches) not in self._known:
            programs = programs_for(self._config, self._layout.folding, microbatches, training=training)
            self._call("learn", [(programs[place.position], training) for place in self._layout.places])
            self._known.add((training, microbatches))

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _call(self, method: str, arguments: list[tuple], timeout_seconds: float | None = None) -> list[Any]:
        return call(self._ranks, method, arguments, timeout_seconds or self._config.training.step_timeout_seconds + 30)

    def _event(self, kind: str, **details: Any) -> None:
        self._watch("event", self._folder.event(kind, **details))


def check_compatible(manifest: checkpoint.Manifest, config: RunConfig, directory: str) -> None:
    """Raises TrainingFailed: the checkpoint is of another model."""
    ours = config.model.model_dump(mode="json")
    for key, value in manifest.model.items():
        if ours.get(key) != value:
            raise TrainingFailed(f"model.{key} = {ours.get(key)}: the checkpoint {directory} has {value}")


def _losses(sums: LossSums, batch: Batch, config: RunConfig) -> dict[str, float]:
    """Means over the batch. `loss` is the next-token cross-entropy in nats a token."""
    divisors = batch.divisors
    found = {"loss": sums.next_token / divisors.next_token}
    if config.model.num_nextn_predict_layers:
        found["mtp_loss"] = sums.mtp / divisors.mtp
    found["balance_loss"] = sums.balance / divisors.sequences
    return found


def _mean(reports: list[StepReport]) -> Figures:
    """Every figure as the mean over ranks."""
    columns = zip(*(astuple(report.figures) for report in reports))
    return Figures(*(sum(column) / len(reports) for column in columns))


def _busiest(reports: list[StepReport]) -> float:
    """Largest expert load divided by the mean, in the worst layer; 1 where there are no experts."""
    loads = [load for report in reports for load in report.load.values() if sum(load)]
    return max((max(load) * len(load) / sum(load) for load in loads), default=1.0)


def _placement_record(config: RunConfig, layout: Layout) -> list[Any]:
    """Expert ids by replica, position, and index in the EP group."""
    return [[place_experts(config.model, layout, replica, position) for position in range(layout.pipeline)]
            for replica in range(len(layout.replicas))]


def _layout_record(layout: Layout) -> dict[str, Any]:
    record = asdict(layout)
    record |= {"pipeline": layout.pipeline, "nodes": list(layout.nodes)}
    return record
