"""What a run finds when it begins: storage that is away, ranks that are left, remains of writers that were killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runtime import configured, train

from actors.calls.messages import Start
from actors.data.dataset import DatasetError
from actors.files import storage
from actors.files.run_folder import RunFolder
from actors.files.storage import Damaged, StorageError
from actors.protocol.trainer import Sources, Trainer
from actors.state import checkpoint
from orchestrator.protocol.members import Member
from orchestrator.told.kinds import StorageAway


class Opened(Exception):
    """All that storage has to say has been read: ranks are next."""


class Untouched:
    def enlist(self, members):
        raise Opened


class Away:
    """What cannot be read, so many times."""

    def __init__(self, read, error, times=3):
        self.read, self.error, self.left = read, error, times

    def __call__(self):
        if self.left:
            self.left -= 1
            raise self.error
        return self.read()


def opening(tmp_path, *, left_behind, ledger=None, data=lambda: None):
    """A trainer that raises Opened once it has what it needs, and what it told by then."""
    config, layout = configured("PP2xEP2", f"run.directory={tmp_path}")
    folder, told = RunFolder(str(tmp_path), "run"), []
    if ledger is not None:
        ledger.read, folder.ledger = folder.ledger, ledger
    start = Start((Member("a", 0),), left_behind=left_behind)
    return Trainer(config, layout, Untouched(), folder, Sources(lambda step: None, data),
                   watch=lambda kind, values: told.append((kind, values)), start=start), told


def data_away() -> DatasetError:
    error = DatasetError("data/manifest.json: Stale file handle")
    error.__cause__ = StorageError("data/manifest.json", "Stale file handle")
    return error


AWAY = [({"ledger": Away(None, StorageError("ledger.jsonl", "Stale file handle"))}, "ledger.jsonl: Stale file handle"),
        ({"data": Away(lambda: None, data_away())}, "data/manifest.json: Stale file handle")]


@pytest.mark.parametrize("what, reason", AWAY)
def test_storage_that_is_away_is_waited_for_where_ranks_hold_the_state(tmp_path, what, reason):
    trainer, told = opening(tmp_path, left_behind=True, **what)
    with pytest.raises(Opened):
        trainer.run()
    assert [(kind, one.event) for kind, one in told] == [("event", StorageAway(reason))]
    assert [one.event for one in RunFolder(str(tmp_path), "run").events()] == [StorageAway(reason)]


@pytest.mark.parametrize("left_behind, error", [
    (False, StorageError("ledger.jsonl", "Stale file handle")), (True, Damaged("ledger.jsonl", "line 2 is damaged"))])
def test_what_nothing_is_lost_by_or_waiting_does_not_mend_is_said_at_once(tmp_path, left_behind, error):
    trainer, told = opening(tmp_path, left_behind=left_behind, ledger=Away(None, error))
    with pytest.raises(StorageError, match=error.reason):
        trainer.run()
    assert told == []


@pytest.mark.parametrize("left_behind", [False, True])
def test_no_older_checkpoint_is_taken_for_one_that_is_away(tmp_path, monkeypatch, left_behind):
    """Nor is it told that it cannot be read: it is waited for, or the start is refused, where nothing is lost by that."""
    trainer, told = opening(tmp_path, left_behind=left_behind)
    for step in (3, 6):
        checkpoint.commit(checkpoint.folder(trainer._folder.checkpoints, step), checkpoint.Manifest(step, {}, "float32", ()))
    read, left = storage.read_bytes, [2]

    def away(uri):
        if "step-00000006" in uri and left[0]:
            left[0] -= 1
            raise StorageError(uri, "Stale file handle")
        return read(uri)

    monkeypatch.setattr(checkpoint.storage, "read_bytes", away)
    with pytest.raises(Opened if left_behind else StorageError, match="" if left_behind else "step-00000006.*Stale"):
        trainer.run()
    assert [one.name for _, one in told] == ["storage_away"] * left_behind


def test_a_manifest_that_cannot_be_read_is_told_as_a_run_begins(tmp_path):
    trainer, told = opening(tmp_path, left_behind=False)
    whole, cut = (checkpoint.folder(trainer._folder.checkpoints, step) for step in (3, 6))
    for step, directory in ((3, whole), (6, cut)):
        checkpoint.commit(directory, checkpoint.Manifest(step, {}, "float32", ()))
    manifest = Path(cut, "manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:20])
    with pytest.raises(Opened):
        trainer.run()
    (kind, one), = told
    assert (kind, one.name, one.event.step, one.event.path) == ("event", "checkpoint_unreadable", 6, cut)
    assert str(manifest) in one.event.reason and "\n" not in one.event.reason
    assert RunFolder(str(tmp_path), "run").events() == [one]


def test_what_writers_that_were_killed_left_is_cleared_away(tmp_path):
    old, new = (tmp_path / "run" / f".metrics.jsonl.{number}.partial" for number in (1, 2))
    old.parent.mkdir()
    for left in (old, new):
        left.write_bytes(b"x")
    os.utime(old, (0, 0))
    with pytest.raises(Opened):
        opening(tmp_path, left_behind=False)[0].run()
    assert not old.exists() and new.exists()


def test_steps_that_were_cut_back_to_none_leave_the_metrics(ranks, tmp_path):
    """The coordinator that wrote that line died before it cut them."""
    folder = RunFolder(str(tmp_path), "run")
    folder.ledger()
    folder.append({"kind": "epoch", "epoch": 1})
    for step in range(3):
        folder.append({"step": step, "generation": 1})
        folder.metrics({"step": step, "spent": {}})
    folder.append({"kind": "cut", "step": 0, "reason": "lost"})
    folder.close()
    run = train(ranks, tmp_path, *configured("PP2xEP2", "training.steps=2"))
    assert run.error is None
    assert [line["step"] for line in RunFolder(str(tmp_path), "run").metric_lines()] == [0, 1]
