from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ray
from corpus import make, texts

from actors.data import feed as feed_module
from actors.data import packing
from actors.data.dataset import Dataset, DatasetError
from actors.data.feed import VALIDATION, Feed, read_validation
from orchestrator.config.run_config import parse
from orchestrator.data import order

LENGTH, WAIT = 8, 60.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_MOST_GROUPS", 4)
        return make(tmp_path_factory.mktemp("feed") / "data", texts(2, 60), texts(3, 6), LENGTH)


@pytest.fixture
def config():
    return parse({"data": {"sequence_length": LENGTH, "shuffle_window": 3, "prefetch_steps": 2},
                  "training": {"batch_sequences": 97, "batch_ramp": {"start_sequences": 10, "steps": 5}}})


def expected(corpus, config, step):
    """Step's rows by the rule alone, read from the shards directly."""
    position, count = order.first_position(config.training, step), order.batch_size(config.training, step)
    return order.sequences_of(corpus.train.shape, config.run.seed, config.data.shuffle_window, position, count)


@pytest.mark.parametrize("first, end", [(0, 40), (23, 26), (300, 303)])
def test_steps_hold_the_sequences_of_the_order(ray_local, corpus, config, first, end, monkeypatch):
    """Small chunks and legs, so that steps straddle chunks, legs, epochs (16 steps each) and the ramp."""
    monkeypatch.setattr(feed_module, "_CHUNK_BYTES", 8000)
    monkeypatch.setattr(feed_module, "_LEG_BYTES", 50000)
    feed = Feed(corpus, config, first, end)
    try:
        for step in range(first, end):
            batch = feed.next(WAIT)
            rows = expected(corpus, config, step)
            assert batch.step == step and batch.sequence_ids.tolist() == rows and batch.sequence_ids.dtype == "int64"
            assert batch.tokens.dtype == batch.valid.dtype == "int32"
            assert (batch.tokens == corpus.read_rows(corpus.train, rows)).all()
            assert (batch.valid == corpus.valid_tokens(corpus.train, rows)).all()
        with pytest.raises(ValueError, match=f"ends before step {end}"):
            feed.next(WAIT)
    finally:
        feed.close()


def test_order_holds_when_later_tasks_finish_first(ray_local, corpus, monkeypatch):
    class SlowAtFirst(Dataset):  # here, so that it travels to the workers by value
        """The task that reads row 0 takes long enough for others to overtake it."""

        def read_rows(self, split, rows):
            for _ in range(3000 if 0 in rows else 1):
                found = Dataset.read_rows(self, split, rows)
            return found

    monkeypatch.setattr(feed_module, "_CHUNK_BYTES", 8000)
    monkeypatch.setattr(feed_module, "_READER_BYTES", 1)
    config = parse({"data": {"sequence_length": LENGTH, "shuffle_window": 3}, "training": {"batch_sequences": 97}})
    slow = SlowAtFirst(**vars(corpus))
    first = next(step for step in range(100) if 0 in expected(corpus, config, step))
    feed = Feed(slow, config, first, first + 10)
    for step in range(first, first + 10):
        assert feed.next(WAIT).sequence_ids.tolist() == expected(corpus, config, step)
    feed.close()


def test_starting_late_reads_only_the_windows_of_its_steps(ray_local, tmp_path, config):
    """Every shard without a row of the steps' windows is deleted: the feed must not miss it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_MOST_GROUPS", 1)
        corpus = make(tmp_path / "data", texts(4, 60), [], LENGTH)
    position, count = order.first_position(config.training, 12), 2 * 97
    pieces = order.windows_of(corpus.train.shape, config.run.seed, config.data.shuffle_window, position, count)
    needed = {group for window, _, _ in pieces for group in window.groups}
    assert len(needed) <= 9 < len(corpus.train.shards)
    for number, shard in enumerate(corpus.train.shards):
        if number not in needed:
            (Path(corpus.path) / shard.name).unlink()
    feed = Feed(corpus, config, 12, 14)
    assert [feed.next(WAIT).sequence_ids.tolist() for _ in range(2)] == [expected(corpus, config, step) for step in (12, 13)]
    feed.close()


def test_a_missing_shard_is_raised_by_next(ray_local, tmp_path, config):
    corpus = make(tmp_path / "data", texts(5, 30), [], LENGTH)
    (Path(corpus.path) / corpus.train.shards[0].name).unlink()
    feed = Feed(corpus, config, 0, 5)
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"train/shard-00000.parquet: does not exist$"):
            feed.next(WAIT)
    feed.close()


@pytest.mark.parametrize("late", [False, True])
def test_without_ray_data_it_reads_by_itself(corpus, config, monkeypatch, late):
    """A node that was reading is lost, or frozen: no step is late for it, none is read twice or never."""
    answer = threading.Event()

    def read(self, leg):
        if late:
            answer.wait()
        raise ray.exceptions.NodeDiedError("the node that was reading")

    monkeypatch.setattr(Feed, "_read", read)
    monkeypatch.setattr(feed_module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(feed_module, "_CHUNK_BYTES", 8000)
    monkeypatch.setattr(feed_module, "_LEG_BYTES", 20000)
    feed = Feed(corpus, config, 3, 20)
    try:
        for step in range(3, 20):
            assert feed.next(WAIT).sequence_ids.tolist() == expected(corpus, config, step)
        assert feed.read_here > 1
    finally:
        answer.set()
        feed.close()


def test_waits_are_bounded_and_close_wakes_a_waiter(corpus, config, monkeypatch):
    """Ray that never answers: next() gives up in time, close() releases a thread inside next() and abandons the reader."""
    answer = threading.Event()
    monkeypatch.setattr(Feed, "_run", lambda self, leg: answer.wait() and [])
    monkeypatch.setattr(feed_module, "_CLOSE_SECONDS", 0.05)
    feed = Feed(corpus, config, 7, 9)
    with pytest.raises(DatasetError, match="no data for step 7 within 0.05 s: Ray Data needs a free CPU"):
        feed.next(0.05)
    outcome = []

    def wait():
        try:
            feed.next(WAIT)
        except ValueError as error:
            outcome.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    started = time.monotonic()
    feed.close()
    waiter.join(WAIT)
    assert outcome == ["the feed is closed"] and time.monotonic() - started < 5
    answer.set()


def test_reads_ahead_no_further_than_asked(ray_local, corpus, config):
    feed = Feed(corpus, config, 0, 30)
    first = feed.next(WAIT)
    with feed._changed:
        assert feed._changed.wait_for(lambda: len(feed._ready) == 2, WAIT)
        assert not feed._changed.wait_for(lambda: len(feed._ready) > 2, 0.1)
    feed.close()
    assert first.step == 0 and not feed._thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        feed.next(WAIT)
    feed.close()


def test_an_idle_feed_uses_no_cpu_and_leaves_no_threads(ray_local, corpus, config):
    before = threading.active_count()
    feed = Feed(corpus, config, 0, 30)
    feed.next(WAIT)
    with feed._changed:
        feed._changed.wait_for(lambda: len(feed._ready) == 2, WAIT)
        cpu = time.process_time()
        feed._changed.wait_for(lambda: False, 0.5)
    assert time.process_time() - cpu < 0.25
    feed.close()
    assert threading.active_count() <= before + 1


def test_validation_is_the_first_rows(corpus):
    found = read_validation(corpus, 5)
    assert found.step == VALIDATION and found.sequence_ids.tolist() == [0, 1, 2, 3, 4]
    assert (found.tokens == corpus.read_rows(corpus.validation, range(5))).all()
    everything = read_validation(corpus, 10**6)
    assert len(everything.valid) == corpus.validation.sequences and everything.valid[-1] == corpus.validation.last_row_tokens
