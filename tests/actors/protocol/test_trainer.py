"""Whole runs over rank processes: the same curve whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time

import pytest
import torch
from runtime import Run, batch_of, configured, digest_by_hand, furthest, on_all, same, state, train

from actors.files.journal import Journal
from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from actors.protocol.trainer import TrainingFailed
from actors.state import checkpoint
from orchestrator.data.ledger import read
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import Ending
from orchestrator.schedule.ir.actions import ActionKind


@pytest.fixture(scope="module")
def reference(ranks, tmp_path_factory):
    """Six steps, never stopped: (run, its folder, state at the end)."""
    folder = tmp_path_factory.mktemp("reference")
    config, layout = configured()
    run = train(ranks, folder, config, layout)
    assert run.error is None
    return run, folder, state(ranks, layout)


@pytest.fixture(scope="module")
def stopped(ranks, tmp_path_factory):
    """The folder of the same run, stopped after three steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run = train(ranks, folder, *configured(), stop_after=3)
    assert run.error is None and run.outcome.interrupted and run.outcome.step == 3
    return folder


def ledger(folder):
    return RunFolder(str(folder), "run").ledger_lines()


def test_it_learns(reference):
    losses = [step["loss"] for step in reference[0].steps]
    assert reference[0].outcome.step == len(losses) == 6 and not reference[0].outcome.interrupted
    assert all(3.5 < loss < 5 for loss in losses)  # ln 61 = 4.1


def test_metrics_say_when_a_step_began_and_when_it_was_committed(reference):
    """By the clock of the host: its first action comes after the last commit, its own after all that is computed."""
    steps, rounded = reference[0].steps, 0.001
    for step in steps:
        assert step["began"] + step["compute_seconds"] <= step["time"] + rounded
    for before, step in itertools.pairwise(steps):
        assert before["time"] - rounded <= step["began"]


def test_a_run_repeats_bit_for_bit(ranks, reference, tmp_path):
    config, layout = configured()
    again = train(ranks, tmp_path, config, layout)
    assert again.losses == reference[0].losses
    assert same(state(ranks, layout), reference[2])


def test_a_run_continues_where_it_was_stopped(ranks, reference, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    config, layout = configured()
    rest = train(ranks, tmp_path, config, layout)
    assert rest.losses == reference[0].losses[3:]
    assert same(state(ranks, layout), reference[2])
    assert [line["step"] for line in ledger(tmp_path)] == list(range(6))
    assert rest.told("resumed")[0]["steps_to_redo"] == 0


@pytest.mark.parametrize("name", ["EP4", "PP4", "one rank"])
def test_a_run_continues_on_another_layout(ranks, reference, stopped, tmp_path, name):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    config, layout = configured(name)
    rest = train(ranks, tmp_path, config, layout)
    assert torch.tensor(rest.losses) == pytest.approx(torch.tensor(reference[0].losses[3:]), rel=1e-10)
    assert furthest(state(ranks, layout), reference[2]) < 1e-10
    assert [line["step"] for line in ledger(tmp_path)] == list(range(6))


def test_steps_after_the_checkpoint_are_redone(ranks, reference, stopped, tmp_path):
    """A run that died two steps after its last checkpoint: their lines go, the steps stand in the journals once."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for name in ("ledger", "metrics"):
        with open(tmp_path / "run" / f"{name}.jsonl", "a") as stream:
            stream.write('{"step": 3, "loss": 0}\n{"step": 4, "loss": 0}\n{"step": 5, "lo')
    rest = train(ranks, tmp_path, *configured())
    assert rest.told("resumed")[0]["steps_to_redo"] == 2
    assert [(line["step"], line["loss"]) for line in ledger(tmp_path)] == [
        (step, values[0]) for step, values in enumerate(reference[0].losses)]
    assert [m["step"] for m in RunFolder(str(tmp_path), "run").metric_lines()] == list(range(6))


def test_the_ledger_names_the_sequences_that_ran(reference):
    config, _ = configured()
    lines = ledger(reference[1])
    assert [line["digest"] for line in lines] == [digest_by_hand(batch_of(config, step)) for step in range(6)]
    assert [(line["step"], line["first"], line["count"]) for line in lines] == [(step, 8 * step, 8) for step in range(6)]
    assert "layout" in lines[0] and all("layout" not in line for line in lines[1:])


def test_validation_changes_nothing(ranks, reference, tmp_path):
    config, layout = configured("PP2xEP2", "training.validate_every=1", "training.validation_sequences=6")
    run = train(ranks, tmp_path, config, layout)
    assert run.losses == reference[0].losses
    assert same(state(ranks, layout), reference[2])
    assert [event["step"] for event in run.told("validation")] == [1, 2, 3, 4, 5, 6]
    assert run.outcome.validation_loss == run.told("validation")[-1]["loss"]


class Counting:
    """Ranks that remember which programs each was taught, by member."""

    def __init__(self, ranks):
        self.ranks, self.taught = ranks, {}

    def __getattr__(self, name):
        return getattr(self.ranks, name)

    def send(self, call, member, generation, method, arguments, lane):
        if method == "step" and arguments[0].program is not None:
            self.taught.setdefault(member, []).append(arguments[0].microbatches)
        self.ranks.send(call, member, generation, method, arguments, lane)


def test_a_ramp_teaches_each_program_once(ranks, tmp_path):
    ramp = ["training.batch_sequences=24", "training.batch_ramp={start_sequences: 3, steps: 4}"]
    counting = Counting(ranks)
    config, layout = configured("PP2xEP2", *ramp)
    run = train(counting, tmp_path / "ramp", config, layout)
    assert [step["sequences"] for step in run.steps] == [3, 8, 13, 18, 24, 24]
    taught = [4, 8, 10, 12]  # two streams, two directions, one sequence each; at least twice the pipeline
    assert list(counting.taught.values()) == [taught] * 4
    alone = train(ranks, tmp_path / "alone", *configured("one rank", *ramp))  # 3 sequences leave microbatches empty above
    assert torch.tensor(run.losses) == pytest.approx(torch.tensor(alone.losses), rel=1e-10)
    assert [line["first"] for line in ledger(tmp_path / "ramp")] == [0, 3, 11, 24, 42, 66]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(ranks, reference, tmp_path, recompute):
    run = train(ranks, tmp_path, *configured("PP2xEP2", "training.steps=2", f"training.recompute={recompute}"))
    assert run.losses == reference[0].losses[:2]


def test_low_precision_is_near(ranks, reference, tmp_path):
    config, layout = configured("PP2xEP2", "training.steps=2", "training.dtype=bfloat16")
    run = train(ranks, tmp_path, config, layout)
    assert [step["loss"] for step in run.steps] == pytest.approx([step["loss"] for step in reference[0].steps[:2]], rel=2e-2)
    assert run.losses != reference[0].losses[:2]
    assert {values.dtype for values in state(ranks, layout).values()} == {torch.float32}


# --- what ends a run -------------------------------------------------------------------------------------------------


def poison_weights(host):
    """The working copy only: a bit flip, as it were, after the update of the step before has rebuilt it."""
    zero = host.optimizer.zero_gradients

    def poisoned():
        zero()
        host.optimizer.weights["model.layers.1.self_attn.o_proj.weight"].value[0, 0] = float("nan")

    host.optimizer.zero_gradients = poisoned


def poison_gradients(host):
    """After all losses are known."""
    reduce = host.optimizer.reduce

    def poisoned(groups, world):
        host.optimizer._buffers[0].gradient[0] = float("inf")
        reduce(groups, world)

    host.optimizer.reduce = poisoned


@pytest.mark.parametrize("poison", [poison_weights, poison_gradients])
def test_a_step_that_is_not_finite_ends_the_run_unharmed(ranks, stopped, tmp_path, poison):
    config, layout = configured()
    run = train(ranks, tmp_path, config, layout, before={3: lambda: on_all(ranks, poison, 1)})
    assert isinstance(run.error, TrainingFailed) and "step 3" in str(run.error) and "\n" not in str(run.error)
    assert [line["step"] for line in ledger(tmp_path)] == [0, 1, 2] and len(run.told("not_finite")) == 1
    healthy = checkpoint.read_manifest(checkpoint.complete(str(stopped / "run" / "checkpoints"))[-1])
    saved = checkpoint.read_manifest(checkpoint.complete(str(tmp_path / "run" / "checkpoints"))[-1])
    assert saved == healthy and saved.step == 3  # pieces carry hashes of their bytes


def break_backward(host):
    def broken(action, work):
        raise ValueError("no such thing")

    host._executor._handlers[ActionKind.BACKWARD] = broken


def test_an_error_that_all_ranks_have_ends_the_run_and_is_told(stage):
    """Nobody waits for what will not come, and it is not tried for ever."""
    run = Run()
    breaking = {1: lambda: on_all(stage.company, break_backward, 4)}
    started = time.monotonic()
    stage.run("PP2xEP2", "elastic.cool_down_seconds=0.2", before=breaking, run=run)
    assert time.monotonic() - started < 30
    assert isinstance(run.error, TrainingFailed) and run.error.ending is Ending.OWN_FAULT and "\n" not in str(run.error)
    assert all(part in str(run.error) for part in ("generation ", "position ", "action B", "no such thing"))
    assert run.folder.ledger().committed == 1


# --- a disk that is full ---------------------------------------------------------------------------------------------


def test_a_failed_checkpoint_does_not_end_the_run(ranks, reference, small_disk):
    config, layout = configured("PP2xEP2", "checkpoint.every=3")
    room = {2: lambda: small_disk.fill(leaving=100_000), 5: small_disk.free}
    run = train(ranks, small_disk.folder, config, layout, before=room)
    assert run.error is None and run.losses == reference[0].losses
    assert [(event["step"], "no space left" in event["reason"]) for event in run.told("checkpoint_failed")] == [(3, True)]
    folders = [path.name for path in (small_disk.folder / "run" / "checkpoints").iterdir()]
    assert folders == ["step-00000006"]


def test_the_last_checkpoint_must_be_written(ranks, small_disk):
    small_disk.fill(leaving=100_000)
    run = train(ranks, small_disk.folder, *configured("PP2xEP2", "training.steps=2", "elastic.storage_seconds=1"))
    assert isinstance(run.error, TrainingFailed) and run.error.ending is Ending.STORAGE and "\n" not in str(run.error)
    assert "no checkpoint of step 2" in str(run.error) and "no space left" in str(run.error)


def test_a_step_counts_only_once_its_line_is_written(ranks, tmp_path, small_disk):
    folder = RunFolder(str(tmp_path / "runs"), "run")
    path = small_disk.folder / "ledger.jsonl"
    folder._ledger = Journal(str(path), durable=True, alone=True)
    small_disk.fill(leaving=4096)  # one page: some lines fit
    run = train(ranks, folder, *configured("PP2xEP2", "training.steps=60", "elastic.storage_seconds=0.5"))
    assert isinstance(run.error, TrainingFailed) and run.error.ending is Ending.STORAGE
    assert "\n" not in str(run.error) and "ledger.jsonl" in str(run.error)
    steps = [line["step"] for line in read(path.read_text().splitlines()).steps]
    assert 1 <= len(steps) < 60 and steps == list(range(len(steps)))
    assert len(run.steps) == len(steps)
    assert checkpoint.read_manifest(checkpoint.complete(folder.checkpoints)[-1]).step == len(steps)  # what is committed is kept


def test_a_ledger_that_can_be_written_again_goes_on(ranks, reference, tmp_path):
    """No step is lost meanwhile, and no line is there twice."""
    failures = [StorageError("ledger", "no space left on device")] * 3

    class Failing(Journal):
        def append(self, line):
            if failures and json.loads(line).get("step") == 3:
                raise failures.pop()
            super().append(line)

    folder = RunFolder(str(tmp_path), "run")
    folder._ledger = Failing(str(tmp_path / "run" / "ledger.jsonl"), durable=True, alone=True)
    run = train(ranks, folder, *configured())
    assert run.error is None and not failures and run.losses == reference[0].losses
    assert [event["reason"] for event in run.told("storage_away")] == ["ledger: no space left on device"]
    assert [line["step"] for line in ledger(tmp_path)] == list(range(6))


# --- checkpoints beside the training ---------------------------------------------------------------------------------


class SlowDisk(Counting):
    """Pieces of checkpoints are there when the test says so."""

    def __init__(self, ranks):
        super().__init__(ranks)
        self._waiting, self._lock = [], threading.Lock()

    def send(self, call, member, generation, method, arguments, lane):
        with self._lock:
            if lane is CallLane.FILES and self._waiting is not None:
                self._waiting.append((call, member, generation, method, arguments, lane))
                return
        self.ranks.send(call, member, generation, method, arguments, lane)

    def ready(self):
        with self._lock:
            waiting, self._waiting = self._waiting, None
        for arguments in waiting:
            self.ranks.send(*arguments)


def test_training_does_not_wait_for_a_slow_disk(ranks, reference, tmp_path):
    slow = SlowDisk(ranks)
    config, layout = configured("PP2xEP2", "checkpoint.every=1", "checkpoint.keep=9")
    run = train(slow, tmp_path, config, layout, before={4: slow.ready})
    assert run.error is None and run.losses == reference[0].losses
    steps = [event["step"] for event in run.told("checkpoint")]
    assert steps[0] == 1 and steps[-1] == 6 and not {2, 3, 4} & set(steps)


def test_another_model_is_refused_in_one_line(ranks, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run = train(ranks, tmp_path, *configured("PP2xEP2", "model.rope_theta=500.0"))
    assert isinstance(run.error, checkpoint.CheckpointError) and str(run.error).startswith("model.rope_theta = 500.0: the checkpoint ")
    assert "\n" not in str(run.error)
