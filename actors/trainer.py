"""The training loop: carries a run from its state to its last committed step, over any transport of ranks.

A step: deal the batch, one call per rank, wait for all answers (computed and reduced, nothing changed yet), write the
ledger line; the update is carried by the next call. Nothing here touches a tensor.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from actors import checkpoint
from actors.dealing import Batch
from actors.formation import FORM_TIMEOUT_SECONDS, Formation
from actors.messages import Apply, LossSums, Outcome, Start, StepReport
from actors.ranks import RankFailed, Ranks
from actors.records import SHOWN_RANKS, generation_record, loads_of, losses_of, step_metrics, timeline
from actors.recovery import CannotGoOn, Recovery, StoppedWaiting
from actors.run_folder import RunFolder
from actors.saving import Saver
from actors.slow import SlowWatch
from actors.spending import Spending
from actors.trace import trace_json
from actors.validation import Validator
from orchestrator import cost, goodput, order
from orchestrator.config import RunConfig, dump
from orchestrator.expert_load import ExpertLoad
from orchestrator.layout import Layout, Place
from orchestrator.ledger import LedgerLine, combine, digest_text, to_json
from orchestrator.placement import balanced_placement, moves, worst_unevenness
from orchestrator.recipe import learning_rate
from orchestrator.schedule.spans import Span

T = TypeVar("T")


class TrainingFailed(RuntimeError):
    """The run cannot go on. `str()` is one line."""


class _WentBack(Exception):
    """The state is that of an earlier step: what was under way is void."""


class Batches(Protocol):
    """Where batches come from: `next()` gives those of consecutive steps."""

    def next(self) -> Batch: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sources:
    """`training(first_step)` opens the batches from a step on; `validation()` gives the held-out batch, or None."""

    training: Callable[[int], Batches]
    validation: Callable[[], Batch | None]


class Trainer:
    """`watch(kind, values)` is told each step's metrics ("step"), its loads of experts by layer ("load"), and each event
    ("event").

    `store`: where the ranks meet, served by this process on `host`; None: one of the trainer's own.
    """

    def __init__(self, config: RunConfig, layout: Layout, ranks: Ranks, folder: RunFolder, sources: Sources,
                 host: str = "127.0.0.1", watch: Callable[[str, dict[str, Any]], None] = lambda kind, values: None,
                 store: dist.TCPStore | None = None, start: Start = Start()):
        self._config, self._ranks, self._folder, self._start = config, ranks, folder, start
        self._sources, self._watch, self._stop = sources, watch, threading.Event()
        self._formation = Formation(config, layout, ranks, host, store)
        self._recovery = Recovery(config, self._formation, self._event, self._stop)
        self._saver = Saver(config, self._formation, folder, self._event)
        self._expert_load = ExpertLoad(max(1, config.placement.every))
        self._batches: Batches | None = None
        self._batch: Batch | None = None
        self._committed = self._prepared = 0
        self._pending: Apply | None = None
        self._validator, self._scores = Validator(config, sources.validation), None
        self._change: dict[str, Any] | None = None
        self._spending = Spending()
        self._shown_at = 0.0
        self._traced: dict[int, tuple[list[Span], tuple[Place, ...]]] = {}

    def stop(self) -> None:
        """Ask the loop to save and end after the step under way."""
        self._stop.set()

    def targets(self) -> list[tuple[Place, str]]:
        """host:port of the metrics of every rank that has any, with its place; from any thread."""
        base, about = self._formation.base, self._formation.crew.about  # while seats change, those of the generation before
        places = zip(base.layout.places, base.members, strict=True) if base else ()
        found = ((place, about.get(member, {}).get("target")) for place, member in places)
        return [(place, target) for place, target in found if target]

    def _utilisation(self, tokens_per_second: float) -> float | None:
        """Of all ranks' accelerators; None where it is not known what one of them can do."""
        config, crew = self._config, self._formation.crew
        given = config.telemetry.peak_teraflops
        peaks = [cost.peak_flops(crew.about.get(member, {}).get("device")) if given == "auto" else given * 1e12 for member in crew.seated]
        return cost.utilisation(config.model, config.data.sequence_length, tokens_per_second, peaks)

    def run(self) -> Outcome:
        """Train to the end, or until stopped. Raises TrainingFailed, RankFailed, StorageError, CheckpointError, DatasetError."""
        try:
            if self._start.left_behind:
                self._take_over()
            else:
                self._formation.open(self._start.members)
                self._from_storage()
            self._folder.write("config.yaml", dump(self._config))  # not before: a refused run leaves that of the last one
            return self._train()
        except StoppedWaiting:
            self._ranks.abort()
            return Outcome(self._committed, interrupted=True, validation_loss=None, saved=False)
        except CannotGoOn as error:
            self._ranks.abort()
            raise TrainingFailed(str(error)) from error
        except BaseException:
            self._ranks.abort()
            raise
        finally:
            self._formation.close()
            self._folder.close()

    # --- the way to the first step, and through changes ----------------------------------------------------------

    def _from_storage(self) -> None:
        """A generation of everybody seated, with the state of the newest checkpoint, or initial state."""
        while True:
            try:
                self._formation.form()
                self._committed = self._load()
                self._formation.loaded()
                break
            except RankFailed as failed:
                self._recovery.after(failed, 0, None)
        self._pending = self._batch = None
        self._saver.abandon()
        if self._batches is not None:
            self._batches.close()
        self._batches = self._sources.training(self._committed)
        self._generation_begins()
        self._event("generation", generation=self._formation.generation, layout=self.layout.describe(),
                    nodes=len(self.layout.nodes), step=self._committed)

    def _take_over(self) -> None:
        """Go on where a coordinator that has died left its ranks: what the ledger says is committed, and what they hold."""
        lines = self._folder.ledger_lines()
        committed = lines[-1]["step"] + 1 if lines else 0
        self._folder.trim(committed)
        self._formation.adopt(self._start.members, max((line["generation"] for line in lines), default=0),
                              committed)
        self._event("coordinator_restarted", step=committed, members=len(self._formation.crew.seated),
                    generation=self._formation.base.generation if self._formation.base else None)
        self._committed = committed
        if committed:
            self._pending = Apply(committed - 1, learning_rate(self._config.optimizer, committed - 1, self._config.training.steps))
        if self._recovery.resume(committed, self._pending):
            self._pending = None
            self._batches = self._sources.training(committed)
            self._generation_begins()
        else:
            self._from_storage()

    def _through(self, action: Callable[..., T], *arguments: Any) -> T:
        """Do something that needs all ranks, again and again until no loss interrupts it. Raises _WentBack: the state is that of
        an earlier step now."""
        while True:
            try:
                return action(*arguments)
            except RankFailed as failed:
                with self._spending.on(goodput.RECOVERY):
                    self._spending.step_lost()
                    self._recover(failed)

    def _recover(self, failed: RankFailed) -> None:
        committed = self._committed
        if self._start.replay is not None:
            raise failed
        if self._recovery.after(failed, committed, self._pending):
            self._pending = None
            self._generation_begins()
            return
        self._from_storage()
        if self._committed != committed:
            raise _WentBack

    def _meet_changes(self) -> None:
        replay = self._start.replay
        if replay is None:
            changed = self._recovery.at_boundary(self._committed, self._pending)
        elif changed := self._committed > 0 and replay.begins(self._committed) is not None:
            self._recovery.repeat(replay.at(self._committed), self._committed, self._pending)
        if changed:
            self._pending = None
            self._generation_begins()

    def _generation_begins(self) -> None:
        """What starts anew with another layout or placement."""
        formation = self._formation
        self._slow = SlowWatch(formation.layout, formation.placement)
        self._change = generation_record(formation.config, formation.layout, formation.placement)

    @property
    def layout(self) -> Layout:
        """Of the moment; from any thread."""
        return self._formation.layout

    def _load(self) -> int:
        """Initial state, or that of the newest checkpoint. Returns the first step to run."""
        if self._start.evaluate is not None:
            return self._restore(self._start.evaluate)
        checkpoint.clear_unfinished(self._folder.checkpoints)
        found = checkpoint.complete(self._folder.checkpoints)
        if not found:
            self._formation.everywhere("initialise", timeout_seconds=FORM_TIMEOUT_SECONDS)
            if lost := self._trim(0):
                self._event("started_over", reason="no checkpoint", steps_to_redo=lost)
            return 0
        step = self._restore(found[-1])
        redone = self._trim(step)
        self._event("resumed", step=step, checkpoint=found[-1], steps_to_redo=redone)
        return step

    def _trim(self, step: int) -> int:
        """Steps from `step` on are to be done again; how many had been committed."""
        self._spending.redone(values for values in self._folder.metric_lines() if values["step"] >= step)
        return self._folder.trim(step)

    def _restore(self, directory: str) -> int:
        """Committed steps in that checkpoint. Raises CheckpointError."""
        manifest = checkpoint.read_manifest(directory)
        checkpoint.check_model(manifest, self._config.model, directory)
        self._formation.everywhere("restore", directory, manifest.pieces, manifest.step, timeout_seconds=FORM_TIMEOUT_SECONDS)
        return manifest.step

    # --- the loop ------------------------------------------------------------------------------------------------

    @property
    def _goal(self) -> int:
        """Steps to be committed in the end."""
        if self._start.evaluate is not None:
            return 0
        steps, replay = self._config.training.steps, self._start.replay
        return steps if replay is None else min(steps, replay.steps)

    def _train(self) -> Outcome:
        try:
            while True:
                try:
                    while self._committed < self._goal and not self._stop.is_set():
                        self._advance()
                    return self._end()
                except _WentBack:
                    continue
        finally:
            self._batches.close()

    def _advance(self) -> None:
        """One step, and what is due after it."""
        training = self._config.training
        with self._spending.on(goodput.RECOVERY):
            self._through(self._meet_changes)
        with self._spending.on(goodput.STEP):
            self._through(self._one_step)
        step = self._committed
        if self._prepared != self._formation.generation:
            self._prepared = self._formation.generation
            self._formation.prepare(step)
        if self._start.replay is None and self._due(step, self._config.placement.every) and step < training.steps:
            with self._spending.on(goodput.PLACEMENT):
                self._through(self._rearrange)
        if self._due(step, training.validate_every) and step < training.steps:
            with self._spending.on(goodput.VALIDATION):
                self._through(self._validate)
        with self._spending.on(goodput.CHECKPOINT):
            self._save_when_due()

    def _end(self) -> Outcome:
        interrupted, losses = self._committed < self._goal, None
        if not interrupted:
            losses = self._through(self._validate)
        if self._start.evaluate is None:
            self._through(self._save_last)
        if self._start.replay is not None and not interrupted:
            self._event("replayed", steps=self._committed)
        return Outcome(self._committed, interrupted, losses, self._scores)

    def _one_step(self) -> None:
        started, formation, step = time.perf_counter(), self._formation, self._committed
        if self._batch is None:
            with self._spending.on(goodput.DATA):
                self._batch = self._batches.next()
        batch = self._batch
        telemetry = self._config.telemetry
        traced, show = step in telemetry.trace_steps, time.monotonic() - self._shown_at >= telemetry.timeline_seconds
        requests = formation.dealer.requests(batch, self._pending, training=True, keep_spans=traced or show)
        if not traced:  # the page has room for so many
            requests[SHOWN_RANKS:] = [replace(request, keep_spans=False) for request in requests[SHOWN_RANKS:]]
        formation.teach(requests[0].microbatches, training=True)
        reports: list[StepReport] = formation.call("step", [(request,) for request in requests])
        self._pending = None
        losses = losses_of(sum((report.losses for report in reports), LossSums()), batch, self._config)
        self._refuse_not_finite(step, losses, reports)
        self._refuse_another(step, losses["loss"])
        line = LedgerLine(step, formation.generation, order.first_position(self._config.training, step), len(batch.valid),
                          _digest(step, reports), losses["loss"])
        self._folder.commit(to_json(line, self._change))
        rate = learning_rate(self._config.optimizer, step, self._config.training.steps)
        self._pending, self._committed = Apply(step, rate), step + 1
        self._change = self._batch = None
        self._recovery.went_well()
        self._expert_load = self._expert_load.after(loads_of(reports))
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

    def _refuse_another(self, step: int, loss: float) -> None:
        """Raises TrainingFailed: a repeated step has another loss than the recorded one."""
        replay = self._start.replay
        if replay is not None and step < replay.steps and loss != replay.losses[step]:
            raise TrainingFailed(f"step {step}: loss {loss!r}, but {replay.losses[step]!r} was recorded")

    def _settle(self, step: int) -> None:
        """Keep what is committed when the run must end here: the state before `step`."""
        if step and self._saver.newest_step != step:
            self._save()
        self._saver.collect(wait=True)

    def _publish(self, step: int, batch: Batch, losses: dict[str, float], rate: float, reports: list[StepReport],
                 seconds: float) -> None:
        values = step_metrics(step, batch, losses, rate, reports, seconds, self._formation.generation, len(self.layout.nodes))
        values["spent"] = self._spending.step_done(reports)
        values["redone"] = round(self._spending.take_redone(), 6)
        values["mfu"] = self._utilisation(values["tokens_per_second"])
        self._folder.metrics(values)
        self._watch("step", values)
        self._watch("load", loads_of(reports))
        if reports[0].spans:
            self._shown_at = time.monotonic()
            self._watch("timeline", timeline(step, reports))
        if step in self._config.telemetry.trace_steps:
            self._traced[step] = [span for report in reports for span in report.spans], self.layout.places
            spans, places = ({traced: found[part] for traced, found in self._traced.items()} for part in (0, 1))
            self._folder.write("trace.json", trace_json(spans, places))

    # --- placement, validation and checkpoints: between a committed step and the next ----------------------------------------

    def _rearrange(self) -> None:
        """Move experts, if the load of the last steps is evener with others on a rank. A new generation in the same groups."""
        config, load, formation = self._config, self._expert_load.mean, self._formation
        before = formation.placement
        found = balanced_placement(config.model, formation.layout, before, load, least_gain=config.placement.least_gain,
                                   parts=config.layout.group_parts)
        moving = moves(before, found)
        if not moving:
            return
        self._apply()
        started = time.perf_counter()
        answers = formation.rearrange(found)
        self._generation_begins()
        self._event("placement", step=self._committed, generation=formation.generation, experts=len(moving),
                    bytes=sum(answer.sent for answer in answers), seconds=round(time.perf_counter() - started, 3),
                    unevenness_before=worst_unevenness(before, load), unevenness_after=worst_unevenness(found, load))

    def _validate(self) -> float | None:
        self._apply()
        started = time.perf_counter()
        self._scores = found = self._validator.scores(self._formation)
        if found is None:
            return None
        self._event("validation", step=self._committed, loss=found["loss"], accuracy=found["accuracy"],
                    seconds=round(time.perf_counter() - started, 3))
        return found["loss"]

    def _save_when_due(self) -> None:
        """Begin the checkpoint that is due, unless the one before is still being written: then it begins when that is done.
        Training waits for neither."""
        saver = self._saver
        saver.wanted |= self._due(self._committed, self._config.checkpoint.every)
        saver.collect(wait=False)
        if saver.wanted and not saver.busy and self._committed < self._config.training.steps:
            self._through(self._save)

    def _save(self) -> None:
        self._apply()
        self._saver.begin(self._committed)

    def _save_last(self) -> None:
        if self._saver.newest_step != self._committed:
            self._save()
        self._saver.collect(wait=True, last=True)

    def _apply(self) -> None:
        if self._pending is not None:
            self._formation.everywhere("apply", self._pending)
            self._pending = None

    # --- small things --------------------------------------------------------------------------------------------

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _event(self, kind: str, **details: Any) -> None:
        self._watch("event", self._folder.event(kind, **details))


def _digest(step: int, reports: list[StepReport]) -> str:
    """Of the sequences that ranks ran. Raises TrainingFailed: other ones entered the pipeline than gave labels."""
    entered, labelled = (digest_text(combine(report.digests[end] for report in reports)) for end in (0, 1))
    if entered != labelled:
        raise TrainingFailed(f"step {step}: sequences {entered} entered the pipeline, but labels are of {labelled}")
    return entered
