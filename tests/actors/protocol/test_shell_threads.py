"""The threads beside the conductor: the clerk writes in order, batches are read one ahead, and none of their trouble is an exception."""

from __future__ import annotations

import logging
import queue
import threading
import time

import pytest

from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from actors.protocol.batches import Reader
from actors.protocol.clerk import Clerk
from actors.state.checkpoint import Manifest, complete, folder, read_manifest
from orchestrator.protocol.events import BatchFailed, BatchReady, Ending, LineRefused, Stored, StoreFailed

SECONDS = 20.0


@pytest.fixture
def posted():
    return queue.Queue()


@pytest.fixture
def run_folder(tmp_path):
    found = RunFolder(str(tmp_path), "run")
    found.ledger()
    return found


@pytest.fixture
def clerk(run_folder, posted):
    found = Clerk(run_folder, posted.put)
    yield found
    found.close()


def step(number: int) -> dict:
    return {"step": number, "generation": 1}


def test_lines_are_written_in_order_and_answered(clerk, posted, tmp_path):
    for number in range(20):
        clerk.append(number, step(number))
    assert [posted.get(timeout=SECONDS) for _ in range(20)] == [Stored(number) for number in range(20)]
    assert [line["step"] for line in RunFolder(str(tmp_path), "run").ledger_lines()] == list(range(20))


def test_a_line_that_cannot_be_written_is_answered_and_may_be_tried_again(clerk, posted, run_folder, monkeypatch):
    def full(line):
        raise StorageError("ledger", "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder._ledger, "append", full)
        clerk.append(1, step(0))
        assert posted.get(timeout=SECONDS) == StoreFailed(1, "ledger: no space left on device")
    clerk.append(2, step(0))
    assert posted.get(timeout=SECONDS) == Stored(2)
    assert run_folder.ledger().committed == 1


def test_a_coordinator_that_was_superseded_is_told_so(clerk, posted, tmp_path):
    clerk.append(1, {"kind": "epoch", "epoch": 1})
    assert posted.get(timeout=SECONDS) == Stored(1)
    other = RunFolder(str(tmp_path), "run")
    assert other.ledger().epoch == 1
    other.append({"kind": "epoch", "epoch": 2})
    clerk.append(2, step(0))
    refused = posted.get(timeout=SECONDS)
    assert isinstance(refused, LineRefused) and (refused.order, refused.ending) == (2, Ending.SUPERSEDED)
    kept = tmp_path / "run" / "checkpoints" / "step-00000004"
    kept.mkdir(parents=True)
    for order, ordered in ((3, lambda: clerk.discard(3, str(kept))), (4, lambda: clerk.manifest(4, str(kept), Manifest(4, {}, "float32", ())))):
        ordered()
        refused = posted.get(timeout=SECONDS)
        assert isinstance(refused, LineRefused) and (refused.order, refused.ending) == (order, Ending.SUPERSEDED)
    assert kept.is_dir() and not list(kept.iterdir()), "checkpoints are the other's business now"
    assert RunFolder(str(tmp_path), "run").ledger().committed == 0


def test_who_was_away_finds_that_another_coordinator_has_written(clerk, posted, tmp_path):
    """Though it has nothing to write itself; and the other one's lines stay as they are."""
    clerk.append(1, {"kind": "epoch", "epoch": 1})
    assert posted.get(timeout=SECONDS) == Stored(1) and clerk.superseded(SECONDS) is None
    other = RunFolder(str(tmp_path), "run")
    assert other.ledger().epoch == 1 and clerk.superseded(SECONDS) is None, "it has only read"
    other.append({"kind": "epoch", "epoch": 2})
    found = clerk.superseded(SECONDS)
    assert isinstance(found, LineRefused) and found.ending is Ending.SUPERSEDED and "another process" in found.text
    assert RunFolder(str(tmp_path), "run").ledger().epoch == 2 and posted.empty()


def test_storage_that_does_not_say_who_has_written_is_not_waited_for(clerk, run_folder, monkeypatch):
    """Where it fails, and where it does not return."""
    answers = threading.Event()

    def fail():
        raise StorageError("ledger", "stale")

    for check in (fail, lambda: answers.wait(SECONDS)):
        monkeypatch.setattr(run_folder, "check", check)
        began = time.monotonic()
        assert clerk.superseded(0.05) is None and time.monotonic() - began < SECONDS / 2
    answers.set()


def test_a_checkpoint_counts_once_its_manifest_is_there_and_goes_when_it_is_to(clerk, posted, run_folder):
    directory, manifest = folder(run_folder.checkpoints, 3), Manifest(3, {}, "float32", ())
    clerk.manifest(1, directory, manifest)
    assert posted.get(timeout=SECONDS) == Stored(1)
    assert [read_manifest(found) for found in complete(run_folder.checkpoints)] == [manifest]
    clerk.discard(2, directory)
    assert posted.get(timeout=SECONDS) == Stored(2) and complete(run_folder.checkpoints) == []


def test_what_users_are_told_never_stops_a_run_and_its_trouble_is_told_once(clerk, posted, caplog):
    caplog.set_level(logging.WARNING)
    broken = [True] * 3

    def job():
        if broken:
            broken.pop()
            raise StorageError("metrics", "no space left on device")

    for _ in range(5):
        clerk.chore("metrics.jsonl", job)
    clerk.chore("the end", lambda: posted.put("done"))
    assert posted.get(timeout=SECONDS) == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.jsonl cannot be written: metrics: no space left on device", "metrics.jsonl can be written again"]


def test_what_users_are_told_never_holds_a_run_up(clerk, posted):
    """A file that does not answer, and does not fail either."""
    answers = threading.Event()
    clerk.chore("events.jsonl", lambda: answers.wait(SECONDS))
    clerk.append(1, step(0))
    assert posted.get(timeout=SECONDS / 2) == Stored(1)
    assert not answers.is_set() and clerk.superseded(SECONDS / 2) is None
    answers.set()


# --- batches ---------------------------------------------------------------------------------------------------------


class Source:
    """Counts; a step in `failing` cannot be read while it is there."""

    def __init__(self, step, failing, log):
        self.step, self.failing, self.log = step, failing, log
        log.append(("open", step))

    def next(self):
        if self.step in self.failing:
            raise OSError("no such shard\nor so")
        self.step += 1
        return self.step - 1

    def close(self):
        self.log.append(("close", self.step))


@pytest.fixture
def log():
    return []


@pytest.fixture
def failing():
    return set()


@pytest.fixture
def reader(posted, log, failing):
    found = Reader(lambda step: Source(step, failing, log), posted.put)
    yield found
    found.close()


def test_consecutive_steps_come_from_one_source(reader, posted, log):
    for number in (3, 4, 5):
        reader.need(number)
        assert posted.get(timeout=SECONDS) == BatchReady(number) and reader.batch(number) == number
    assert log == [("open", 3)]


def test_another_step_begins_anew_there_and_what_is_known_is_not_read_again(reader, posted, log):
    for number in (3, 4, 3, 1, 4):
        reader.need(number)
        assert posted.get(timeout=SECONDS) == BatchReady(number) and reader.batch(number) == number
    assert log == [("open", 3), ("close", 5), ("open", 1)]
    reader.forget(4)
    with pytest.raises(KeyError):
        reader.batch(3)
    assert reader.batch(4) == 4


def test_a_batch_that_cannot_be_read_is_told_and_tried_again_from_a_new_source(reader, posted, log, failing):
    failing.add(1)
    reader.need(0)
    assert posted.get(timeout=SECONDS) == BatchReady(0)
    reader.need(1)
    assert posted.get(timeout=SECONDS) == BatchFailed(1, "OSError: no such shard")
    failing.clear()
    reader.need(1)
    assert posted.get(timeout=SECONDS) == BatchReady(1)
    assert log == [("open", 0), ("close", 1), ("open", 1)]


def test_what_storage_that_answers_does_not_give_three_times_is_missing(posted, log, failing):
    found = Reader(lambda step: Source(step, failing, log), posted.put, answers=lambda: True)
    failing.add(0)

    def tried() -> bool:
        found.need(0)
        return posted.get(timeout=SECONDS).lasting
    assert [tried() for _ in range(2)] == [False, False]
    failing.clear()
    found.need(0)
    assert posted.get(timeout=SECONDS) == BatchReady(0)
    found.forget(1)
    failing.add(0)
    assert [tried() for _ in range(3)] == [False, False, True], "those of before do not count"
    found.close()


def test_a_reader_that_is_stuck_does_not_keep_the_run_from_ending(posted, monkeypatch):
    from actors.protocol import batches
    monkeypatch.setattr(batches, "_END_SECONDS", 0.05)
    never = threading.Event()

    class Stuck:
        def next(self):
            never.wait()

        def close(self):
            pass

    stuck = Reader(lambda step: Stuck(), posted.put)
    stuck.need(0)
    stuck.close()
    assert posted.empty()
    never.set()
