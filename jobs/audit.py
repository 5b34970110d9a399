"""Whether each sequence of each committed step was used exactly once: the ledger against the tokenized shards.

The ledger keeps, for each step, the sum of one hash per sequence that ranks really ran. The same sum is computed here from
the shards: `orchestrator.data.order` says which rows a step has, so nothing that a run wrote is believed but the ledger's digests
and its configuration. Row groups are read when a step needs them, and only 16 bytes a row are kept, of the shuffle windows
under way; so memory does not grow with the run. Rows with the same tokens cannot be told apart, nor need they be. Steps that the
ledger says were to be done again are left out: each counts as it was done in the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.data.dataset import Dataset
from actors.files import storage
from orchestrator.config.run_config import RunConfig, TrainingSection
from orchestrator.data import order
from orchestrator.data.ledger import STEP, Cuts, LedgerEntry, combine, digest_text, entries, sequence_digest

LEDGER, METRICS = "ledger.jsonl", "metrics.jsonl"
_DIGEST_BYTES = 16
_READ_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_MODULUS = 1 << 128


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind`: line (not a ledger line, or not as it was written), order (a step missing, twice, late), range (other positions), sequences (other tokens),
    uncommitted (a step that left metrics, and no line)."""

    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class Audited:
    """`steps`, `sequences`: of the lines read. `shards`: how many were read."""

    steps: int
    sequences: int
    shards: int
    problems: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _AuditedLine:
    step: int
    first: int
    count: int
    digest: int


def audit(folder: str, config: RunConfig, dataset: Dataset) -> Audited:
    """Check the run in `folder` (path or URI), made with `config` from `dataset`.

    Raises StorageError: no ledger; DatasetError: a shard that is needed is missing or damaged.
    """
    expected = _Expected(config, dataset)
    problems, steps, sequences, due = [], 0, 0, 0
    ledger = storage.join(folder, LEDGER)
    cuts = Cuts(entries(_lines(ledger)))
    for entry in entries(_lines(ledger)):
        if entry.damaged is None and (entry.kind != STEP or cuts.voids(entry)):
            continue
        line = _parsed(entry)
        if line is None:
            problems.append(Finding(None, "line", f"line {entry.number} of the ledger is not that of a step"))
            continue
        if entry.damaged is not None:
            problems.append(Finding(line.step, "line", f"line {entry.number} of the ledger is damaged: {entry.damaged}"))
        steps, sequences = steps + 1, sequences + line.count
        problems += _order_problems(line.step, due)
        due = max(due, line.step + 1)
        problems += expected.problems(line)
    if steps and (left := _last_step(folder)) is not None and left >= due:
        problems.append(Finding(due, "uncommitted", f"step {due}: no line, though step {left} has left metrics"))
    return Audited(steps, sequences, expected.shards, tuple(problems))


def _order_problems(step: int, due: int) -> list[Finding]:
    if step > due:
        missing = f"step {due}" if step == due + 1 else f"steps {due} to {step - 1}"
        return [Finding(due, "order", f"{missing}: no line")]
    if step < due:
        return [Finding(step, "order", f"step {step}: one more line, after that of step {due - 1}")]
    return []


class _Expected:
    """What the shards say that each step used."""

    def __init__(self, config: RunConfig, dataset: Dataset):
        self._training, self._seed, self._window = config.training, config.run.seed, config.data.shuffle_window
        self._digests = GroupDigests(dataset)
        self._shape = dataset.train.shape
        self._overlapped: tuple[list[order.Window], list[order.Window]] = [], []

    @property
    def shards(self) -> int:
        return len(self._digests.shards)

    def problems(self, line: _AuditedLine) -> list[Finding]:
        first, count = order.first_position(self._training, line.step), order.batch_size(self._training, line.step)
        found = []
        if (line.first, line.count) != (first, count):
            found.append(Finding(line.step, "range", f"step {line.step}: positions {_span(line.first, line.count)} of the order, "
                                                     f"by the configuration {_span(first, count)}"))
            if line.first < 0 or not 0 < line.count <= 2 * self._training.batch_sequences:
                return found
        rows = self._rows(line.first, line.count)
        digests = self._digests.of(rows)
        if (total := combine(digests)) != line.digest:
            found.append(Finding(line.step, "sequences", f"step {line.step}: {self._difference(line, rows, digests, total)}"))
        return found

    def _rows(self, first: int, count: int) -> list[int]:
        pieces = list(order.windows_of(self._shape, self._seed, self._window, first, count))
        self._overlapped = self._overlapped[1], [window for window, _, _ in pieces]
        self._digests.keep({group for windows in self._overlapped for window in windows for group in window.groups})
        return [row for window, begin, end in pieces for row in window.sequences(begin, end)]

    def _difference(self, line: _AuditedLine, rows: Sequence[int], digests: Sequence[int], total: int) -> str:
        """In words: what was run, where that can be told from the sum."""
        for other in (line.step - 1, line.step + 1):
            if other >= 0 and self._total(other) == line.digest:
                return f"the sequences of step {other} were run"
        own = dict(zip(digests, rows))
        known = self._digests.known() | own
        words = explain((line.digest - total) % _MODULUS, own, known)
        if words is None:
            return ("sequences were run that are not its own: digest "
                    f"{digest_text(line.digest)}, by the shards {digest_text(total)}")
        gone, extra = words
        return "; ".join([*(f"sequence {row} was dropped" for row in gone), *(self._came(row, rows) for row in extra)])

    def _came(self, row: int, rows: Sequence[int]) -> str:
        if row in rows:
            return f"sequence {row} was used twice"
        step = self._step_of(row)
        return f"sequence {row}{'' if step is None else f' of step {step}'} was used too"

    def _total(self, step: int) -> int:
        first, count = order.first_position(self._training, step), order.batch_size(self._training, step)
        return combine(self._digests.of(order.sequences_of(self._shape, self._seed, self._window, first, count)))

    def _step_of(self, row: int) -> int | None:
        """The step that a row belongs to, if its window is one of those under way."""
        for windows in self._overlapped:
            for window in windows:
                if row // self._shape.rows_per_group in window.groups:
                    offset = window.sequences(0, window.rows).index(row)
                    return step_at(self._training, window.first + offset)
        return None


def step_at(training: TrainingSection, position: int) -> int:
    """The step that uses a position of the order."""
    low, high = 0, position  # a step has a sequence at least
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if order.first_position(training, middle) <= position else (low, middle - 1)
    return low


def explain(surplus: int, own: Mapping[int, int], known: Mapping[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(rows dropped, rows run too) that account for a sum that is off by `surplus`: at most one of each, or two of one kind.

    Args:
        own, known: row by digest, of the step's own sequences, and of all that may have come instead.
    """
    if surplus in known:
        return (), (known[surplus],)
    if -surplus % _MODULUS in own:
        return (own[-surplus % _MODULUS],), ()
    for digest, row in own.items():
        if (came := (surplus + digest) % _MODULUS) in known:
            return (row,), (known[came],)
    for digest, row in own.items():
        if (other := (-surplus - digest) % _MODULUS) in own and other != digest:
            return (row, own[other]), ()
        if (other := (surplus - digest) % _MODULUS) in own:
            return (), (row, own[other])
    return None


class GroupDigests:
    """Digests of rows of the training split, read by row group. `shards`: numbers of those read so far."""

    def __init__(self, dataset: Dataset):
        self._dataset, self._split = dataset, dataset.train
        group_bytes = 4 * (dataset.sequence_length + 1) * self._split.rows_per_group
        self._at_once = max(1, _READ_BYTES // group_bytes)
        self._groups: dict[int, bytes] = {}
        self.shards: set[int] = set()

    def of(self, rows: Sequence[int]) -> list[int]:
        """Digests of these row ids. Raises DatasetError."""
        size = self._split.rows_per_group
        self._read(sorted({row // size for row in rows} - self._groups.keys()))
        return [_nth(self._groups[row // size], row % size) for row in rows]

    def keep(self, groups: set[int]) -> None:
        """Forget all other groups."""
        for group in self._groups.keys() - groups:
            del self._groups[group]

    def known(self) -> dict[int, int]:
        """Row by digest, of all that is kept."""
        size = self._split.rows_per_group
        return {_nth(digests, index): group * size + index for group, digests in self._groups.items()
                for index in range(len(digests) // _DIGEST_BYTES)}

    def _read(self, groups: list[int]) -> None:
        size = self._split.rows_per_group
        for at in range(0, len(groups), self._at_once):
            part = groups[at : at + self._at_once]
            tokens = self._dataset.read_groups(self._split, part)  # of all groups only the split's last is short: it comes last
            for index, group in enumerate(part):
                rows = tokens[index * size : (index + 1) * size]
                self._groups[group] = b"".join(sequence_digest(row.tobytes()).to_bytes(_DIGEST_BYTES, "little") for row in rows)
            self.shards |= {group // self._split.groups_per_shard for group in part}


def _nth(digests: bytes, index: int) -> int:
    return int.from_bytes(digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES], "little")


def _span(first: int, count: int) -> str:
    return f"{first} to {first + count - 1}"


def _parsed(entry: LedgerEntry) -> _AuditedLine | None:
    """None: it is not that of a step."""
    try:
        found = entry.values
        line = _AuditedLine(*(found[key] for key in ("step", "first", "count")), int(found["digest"], 16))
    except (ValueError, KeyError, TypeError):
        return None
    numbers = (line.step, line.first, line.count)
    return line if all(type(value) is int for value in numbers) and line.step >= 0 else None


def _last_step(folder: str) -> int | None:
    """The newest step in the metrics: they are written after the ledger's line."""
    uri, last = storage.join(folder, METRICS), None
    if not storage.exists(uri):
        return None
    for text in _lines(uri):
        found = json_object(text).get("step")
        if isinstance(found, int):
            last = found if last is None else max(last, found)
    return last


def json_object(text: str) -> dict[str, Any]:
    """An object from a journal's line; an empty one, where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lines(uri: str) -> Iterator[str]:
    """The whole lines of a file, read piece by piece. What a crash left of a line is no line."""
    with storage.open_input(uri) as stream:
        rest = b""
        while piece := stream.read(_PIECE_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
