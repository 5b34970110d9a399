"""Storage that is damaged, full or away: a run passes over what it cannot read, waits for what it cannot write, and ends only
where there is nothing to go on from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runtime
from faults import QUICK, STEPS, Folder
from runtime import Run, batch_of
from sabotage import Died, check_curve, dies, once

from actors.data.dataset import DatasetError
from actors.protocol.trainer import TrainingFailed
from orchestrator.protocol.commands import Call, Step
from orchestrator.protocol.events import Ending

# --- checkpoints that are damaged ------------------------------------------------------------------------------------

SAVED = ("training.steps=9", "checkpoint.every=3")


@pytest.fixture(scope="module")
def stopped(stage):
    """The folder of a run that was stopped after seven steps, with checkpoints of three, six and seven."""
    run = Run()

    def stop(kind: str, values: Any) -> None:
        if kind == "step" and values["step"] == 6:
            run.trainer.stop()

    stage.run("PP2xEP2", *QUICK, *SAVED, run=run, watch=stop)
    assert run.error is None and run.outcome.step == 7
    assert sorted(os.listdir(run.folder.checkpoints)) == [f"step-{step:08d}" for step in (3, 6, 7)]
    return Path(run.folder.path).parent


def flipped(checkpoint: Path) -> None:
    piece = min(checkpoint.glob("*.safetensors"))
    content = bytearray(piece.read_bytes())
    content[-9] ^= 1
    piece.write_bytes(content)


def without_a_piece(checkpoint: Path) -> None:
    min(checkpoint.glob("*.safetensors")).unlink()


def cut_short(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:200])


def resumed(stage, stopped: Path, folder: Path, damage: Callable[[Path], None], *steps: int) -> tuple[Run, Path]:
    """The run goes on in a copy of its folder, where checkpoints of these steps are damaged."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    checkpoints = folder / "run" / "checkpoints"
    for step in steps:
        damage(checkpoints / f"step-{step:08d}")
    return stage.run("PP2xEP2", *QUICK, *SAVED, folder=Folder(str(folder))), checkpoints


@pytest.mark.parametrize("damage", [flipped, without_a_piece, cut_short])
def test_a_damaged_checkpoint_is_passed_over(stage, stopped, tmp_path, damage):
    run, checkpoints = resumed(stage, stopped, tmp_path, damage, 7)
    check_curve(stage, run, "PP2xEP2", *SAVED)
    assert [step["step"] for step in run.steps] == [6, 7, 8]
    assert [(event["step"], event["steps_to_redo"]) for event in run.told("resumed")] == [(6, 1)]
    unreadable, = run.told("checkpoint_unreadable")
    assert unreadable["step"] == 7 and "step-00000007" in unreadable["path"] and not run.told("lost")


def test_where_all_are_damaged_it_ends_and_deletes_none(stage, stopped, tmp_path):
    run, checkpoints = resumed(stage, stopped, tmp_path, flipped, 3, 6, 7)
    assert isinstance(run.error, TrainingFailed) and run.error.ending is Ending.NO_STATE
    assert "none of 3 checkpoints can be read" in str(run.error) and "\n" not in str(run.error)
    assert sorted(event["step"] for event in run.told("checkpoint_unreadable")) == [3, 6, 7]
    assert len(list(checkpoints.glob("*/manifest.json"))) == 3 and not run.told("lost") and not run.steps
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes().startswith((stopped / "run" / "ledger.jsonl").read_bytes())


def test_a_checkpoint_of_steps_that_are_void_is_not_gone_on_from(stage, stopped, tmp_path, monkeypatch):
    """It was damaged, so the ledger says that its last step is to be done again; then it is repaired: no step is left out."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "run" / "checkpoints" / "step-00000007"
    flipped(newest)
    with monkeypatch.context() as patch:
        dies(patch, lambda command: isinstance(command, Call) and isinstance(command.request, Step), False)
        cut = stage.run("PP2xEP2", *QUICK, *SAVED, folder=Folder(str(tmp_path)))
    assert isinstance(cut.error, Died) and cut.folder.ledger().committed == 6
    flipped(newest)
    run = stage.run("PP2xEP2", *QUICK, *SAVED, folder=Folder(str(tmp_path)))
    check_curve(stage, run, "PP2xEP2", *SAVED)
    assert [step["step"] for step in run.steps] == [6, 7, 8]


# --- disks that are full ---------------------------------------------------------------------------------------------


def on_a_small_disk(stage, small_disk, name: str) -> Folder:
    """Of the files of a run this one is on a disk of its own."""
    folder = stage.folder()
    os.makedirs(folder.path)
    os.symlink(small_disk.folder / name, Path(folder.path) / name)
    return folder


def test_metrics_that_cannot_be_written_do_not_end_a_run(stage, small_disk):
    folder = on_a_small_disk(stage, small_disk, "metrics.jsonl")
    run = stage.run("PP2xEP2", *QUICK, STEPS, before=once({3: small_disk.fill, 6: small_disk.free}), folder=folder)
    stage.check(run, "PP2xEP2", STEPS, redone=0)
    written = [line["step"] for line in folder.metric_lines()]
    assert 0 in written and 8 in written and len(written) < 9 and not run.told("storage_away")


def test_a_ledger_that_cannot_be_written_is_waited_for(stage, small_disk):
    """No step counts meanwhile, and none is lost or made twice."""
    def room(kind: str, values: Any) -> None:
        if kind == "event" and values.name == "storage_away":
            small_disk.free()

    folder = on_a_small_disk(stage, small_disk, "ledger.jsonl")
    more = "training.steps=24"  # enough for another page of the file
    run = stage.run("PP2xEP2", *QUICK, more, before=once({3: small_disk.fill}), folder=folder, watch=room)
    stage.check(run, "PP2xEP2", more, redone=0)
    away, = run.told("storage_away")
    assert "space" in away["reason"] and not run.told("lost")


# --- data that is away -----------------------------------------------------------------------------------------------


def test_data_that_cannot_be_read_for_a_moment_is_waited_for(stage, monkeypatch):
    failures = iter([DatasetError("train/shard-00000.parquet: Input/output error")] * 3)

    def sometimes(config, step):
        if step == 4 and (error := next(failures, None)) is not None:
            raise error
        return batch_of(config, step)

    stage.reference("PP2xEP2", STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "batch_of", sometimes)
        run = stage.run("PP2xEP2", *QUICK, STEPS)
    stage.check(run, "PP2xEP2", STEPS, redone=0)
    away, = run.told("data_away")
    assert "Input/output error" in away["reason"] and next(failures, None) is None and not run.told("lost")
