"""Ray Data to training steps: the batches of steps t, t+1, ... in the seeded order, read ahead in the background.

orchestrator.data.order says which rows a step has; this module has Ray Data read them. The positions from step t on are cut, at
the borders of shuffle windows, into chunks of a few megabytes; a chunk is one task that reads its row groups from storage
(actors.data.dataset, verified) and returns the rows in order. Ray Data runs the chunks in order (`preserve_order`), a few at a time
(a leg: 16 MB, or one step if that is more); a background thread cuts their rows into steps and keeps `data.prefetch_steps`
of them ready. Starting at step t reads nothing that lies before it but the row groups of the window that it starts in.
Needs an initialised Ray with a free CPU.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
import ray
import ray.data

from actors.data.batching import Batch
from actors.data.dataset import COLUMN, Dataset, DatasetError, list_to_matrix, matrix_to_list
from orchestrator.config.run_config import RunConfig
from orchestrator.data import order

VALIDATION = -1
_CHUNK_BYTES = 4 << 20
_LEG_BYTES = 16 << 20
_READER_BYTES = 64 << 20
_MOST_READERS = 4
_CLOSE_SECONDS = 5.0
PATIENCE_SECONDS = 15.0
"""For one leg: many times what it takes, and no more than a run may be without data."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StepBatch(Batch):
    """A batch whose rows are known: `sequence_ids` int64 [n], row ids. Of the validation split, `step` is `VALIDATION`."""

    sequence_ids: numpy.ndarray


@dataclass(frozen=True)
class _ChunkReader:
    """What a reading task needs besides its chunk; shipped to the workers once."""

    dataset: Dataset
    seed: int
    window: int

    def __call__(self, chunks: pyarrow.Table) -> Iterator[pyarrow.Table]:
        """One table a window. An error becomes a row of its own: Ray would retry it and wrap it in tracebacks."""
        for chunk in chunks.to_pylist():
            try:
                for window, begin, end in self._windows(chunk["position"], chunk["count"]):
                    yield self._table(window.sequences(begin, end))
            except DatasetError as error:
                yield _table(numpy.zeros(1, numpy.int64), numpy.zeros((1, self.dataset.sequence_length + 1), numpy.int32),
                             numpy.zeros(1, numpy.int32), str(error))
                return

    def chunks(self, position: int, end: int) -> Iterator[dict[str, int]]:
        """Cut positions position .. end-1 into chunks of whole windows (but the ends) of about `_CHUNK_BYTES`."""
        limit = max(1, _CHUNK_BYTES // (4 * (self.dataset.sequence_length + 1)))
        first = position
        for window, _, stop in self._windows(position, end - position):
            position = window.first + stop
            if position - first >= limit or position == end:
                yield {"position": first, "count": position - first}
                first = position

    def _windows(self, position: int, count: int) -> Iterator[tuple[order.Window, int, int]]:
        return order.windows_of(self.dataset.train.shape, self.seed, self.window, position, count)

    def _table(self, rows: list[int]) -> pyarrow.Table:
        data, split = self.dataset, self.dataset.train
        return _table(numpy.array(rows, dtype=numpy.int64), data.read_rows(split, rows), data.valid_tokens(split, rows), None)


class Feed:
    """The batches of steps first_step .. end_step-1, one per `next()`. `read_here`: how often Ray Data was of no use.

    Raises DatasetError at once when the training split is empty; what goes wrong later is raised by `next()`.
    """

    def __init__(self, dataset: Dataset, config: RunConfig, first_step: int, end_step: int):
        self._reader = _ChunkReader(dataset, config.run.seed, config.data.shuffle_window)
        dataset.train.shape  # refuses an empty split here
        self._training, self._labels = config.training, config.topology.labels
        self._step, self._end_step = first_step, end_step
        row_bytes = 4 * (dataset.sequence_length + 1)
        self._readers = _readers(row_bytes * config.training.batch_sequences)
        self._leg_rows = max(config.training.batch_sequences, _LEG_BYTES // row_bytes)
        self._ready: collections.deque[StepBatch] = collections.deque()
        self._changed = threading.Condition()
        self._room, self._closed = config.data.prefetch_steps, False
        self._failure: Exception | None = None
        self.read_here = 0
        self._thread = threading.Thread(target=self._produce, args=(first_step,), name="feed", daemon=True)
        self._thread.start()

    def next(self, timeout: float | None = None) -> StepBatch:
        """The next step's batch, waiting at most `timeout` seconds (none: `training.step_timeout_seconds`).

        Raises DatasetError: a shard is missing or damaged, or nothing came in time; ValueError: no step is left, or closed.
        """
        timeout = self._training.step_timeout_seconds if timeout is None else timeout
        with self._changed:
            if self._closed or self._step >= self._end_step:
                raise ValueError("the feed is closed" if self._closed else f"the feed ends before step {self._end_step}")
            if not self._changed.wait_for(lambda: self._ready or self._failure or self._closed, timeout):
                raise DatasetError(f"no data for step {self._step} within {timeout:g} s: Ray Data needs a free CPU, "
                                   "and the data folder must answer")
            if self._ready:
                self._step += 1
                self._changed.notify_all()
                return self._ready.popleft()
            if self._failure:
                raise self._failure
            raise ValueError("the feed is closed")

    def close(self) -> None:
        """Stop reading; waits at most a few seconds for the reader, which is abandoned if Ray does not answer."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def _produce(self, step: int) -> None:
        try:
            for batch in self._batches(step):
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._room or self._closed)
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
        except Exception as error:  # handed over: next() raises it in the thread that asked
            failure = error if isinstance(error, DatasetError) else DatasetError(f"reading training data: {_line(error)}")
            failure.__cause__ = None if failure is error else error
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _batches(self, step: int) -> Iterator[StepBatch]:
        """Cut the stream of rows into steps."""
        stock = _Stock()
        position = order.first_position(self._training, step)
        end = order.first_position(self._training, self._end_step)
        for table in self._tables(position, end):
            stock.add(table, self._reader.dataset.sequence_length + 1)
            while step < self._end_step and stock.rows >= (size := order.batch_size(self._training, step)):
                yield StepBatch(step, *stock.take(size))
                step += 1

    def _tables(self, position: int, end: int) -> Iterator[pyarrow.Table]:
        """Rows position .. end-1 in order, leg by leg.

        A leg is one Ray Data execution, fetched whole before any of it is handed on: an execution whose output waits for a
        slow reader keeps a core busy (Ray 2.60: its scheduling loop does not block once all tasks are done).
        """
        leg: list[dict[str, int]] = []
        rows = 0
        for chunk in self._reader.chunks(position, end):
            if self._closed:
                return
            leg.append(chunk)
            rows += chunk["count"]
            if rows >= self._leg_rows:
                yield from self._run(leg)
                leg, rows = [], 0
        if leg:
            yield from self._run(leg)

    def _run(self, leg: list[dict[str, int]]) -> list[pyarrow.Table]:
        """By Ray Data; or, where that fails or is late, here: a node that reads for us may be lost, cut off or frozen, of which Ray
        may hear after a minute, and training must not wait for it."""
        reading = _Reading(lambda: self._read(leg))
        try:
            found = reading.result(PATIENCE_SECONDS)
        except Exception as error:  # whatever it is: reading here will do, or say why not
            logger.warning("Ray Data could not read: %s", _line(error))
            found = None
        if found is None:
            self.read_here += 1
            logger.warning("reading %d sequences without Ray Data", sum(chunk["count"] for chunk in leg))
            found = list(self._reader(pyarrow.Table.from_pylist(leg)))
        return found

    def _read(self, leg: list[dict[str, int]]) -> list[pyarrow.Table]:
        """Whole, by reference: `iter_batches` leaves a parked thread behind at every execution (Ray 2.60)."""
        with ray.data.DataContext.current(quiet_context(self._readers, self._labels)):
            source = ray.data.from_items(leg, override_num_blocks=len(leg))
            rows = source.map_batches(self._reader.__call__, batch_size=None, batch_format="pyarrow",
                                      concurrency=min(self._readers, len(leg)))
            return ray.get(rows.to_arrow_refs())


class _Reading:
    """A call on a thread of its own, which may never return."""

    def __init__(self, read: Callable[[], list[pyarrow.Table]]):
        self._read, self._done = read, threading.Event()
        self._found: list[pyarrow.Table] | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="feed-reading", daemon=True).start()

    def result(self, seconds: float) -> list[pyarrow.Table] | None:
        """None: not within these seconds. Raises what the call raised."""
        self._done.wait(seconds)
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._read()
        except Exception as error:  # handed over to whoever waits
            self._error = error
        self._done.set()


class _Stock:
    """Rows that have arrived and are not yet in a step."""

    def __init__(self) -> None:
        self.rows = 0
        self._parts: collections.deque[list[numpy.ndarray]] = collections.deque()

    def add(self, table: pyarrow.Table, width: int) -> None:
        """Raises DatasetError when the table carries one."""
        errors = [text for text in table.column("error").to_pylist() if text]
        if errors:
            raise DatasetError(errors[0])
        tokens = list_to_matrix(table.column(COLUMN), width)
        self._parts.append([tokens, table.column("valid").to_numpy(), table.column("id").to_numpy()])
        self.rows += table.num_rows

    def take(self, count: int) -> list[numpy.ndarray]:
        """The first `count` rows as [tokens, valid, ids], copied out of Ray's shared memory."""
        taken, left = [], count
        while left:
            part = self._parts.popleft()
            taken.append([column[:left] for column in part])
            if len(part[0]) > left:
                self._parts.appendleft([column[left:] for column in part])
            left -= len(taken[-1][0])
        self.rows -= count
        return [numpy.concatenate(columns) for columns in zip(*taken)]


def read_validation(dataset: Dataset, count: int) -> StepBatch:
    """The first `count` sequences of the validation split, or all if there are fewer. Raises DatasetError."""
    split = dataset.validation
    rows = numpy.arange(min(count, split.sequences), dtype=numpy.int64)
    return StepBatch(VALIDATION, dataset.read_rows(split, rows), dataset.valid_tokens(split, rows), rows)


def quiet_context(cpus: int | None = None, labels: Mapping[str, str] | None = None) -> Any:
    """A DataContext for ordered, silent work on at most `cpus` CPUs (none: all that are free), of nodes with these labels."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    if cpus is not None:
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(cpu=float(cpus))
    if labels:
        context.execution_options.label_selector = dict(labels)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


def _readers(step_bytes: int) -> int:
    """Reading tasks at once: one suffices until a step has more than `_READER_BYTES`; the cores belong to training."""
    return min(_MOST_READERS, 1 + step_bytes // _READER_BYTES)


def _table(ids: numpy.ndarray, tokens: numpy.ndarray, valid: numpy.ndarray, error: str | None) -> pyarrow.Table:
    errors = pyarrow.array([error] * len(ids), pyarrow.string())
    return pyarrow.table({"id": ids, COLUMN: matrix_to_list(tokens), "valid": valid, "error": errors})


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
