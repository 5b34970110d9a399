"""The commit protocol's record: which step is committed, by which generation, with which sequences.

A step is committed once its line is written; from then on its result survives the loss of any one node. The digest is
the sum, modulo 2**128, of one hash per sequence that ranks ran forward and backward: it does not depend on the layout,
and a sequence dropped, doubled or replaced changes it.

The file only grows. Beside the lines of steps, which have no `kind`, there are three others: `epoch` (a coordinator begins),
`origin` (a generation's state was loaded, from a checkpoint or from initial values) and `cut` (the steps from its own on are void,
for they will be done again). Each line carries the hash of the line before it as `previous`, so that a changed or missing one is
noticed; lines of older versions have none, and are taken as they are. Everybody who reads a ledger does so by `entries` or `read`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

STEP, EPOCH, ORIGIN, CUT = "step", "epoch", "origin", "cut"
_KEYS = {STEP: "step", EPOCH: "epoch", ORIGIN: "generation", CUT: "step"}
"""What every line of a kind has: a whole number."""
_MODULUS = 1 << 128
_HASH_BYTES = 8


class LedgerDamaged(ValueError):
    """A line is not as it was written. `str()` is one line that names it."""


@dataclass(frozen=True)
class LedgerLine:
    """`first` and `count`: the positions [first, first + count) of the seeded order that made up the step."""

    step: int
    generation: int
    first: int
    count: int
    digest: str
    loss: float


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line. number: counted from 1. damaged: what is wrong with it; None: nothing, and `values` are those of its kind."""

    number: int
    kind: str
    values: Mapping[str, Any]
    damaged: str | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a ledger says. steps: lines of the committed steps that no cut has made void, in order. epoch, generation: the highest that
    were used. newest: hash of the last line, for the one that follows it; empty where there is none. furthest: steps that were
    committed before any cut."""

    steps: tuple[Mapping[str, Any], ...] = ()
    epoch: int = 0
    generation: int = 0
    newest: str = ""
    furthest: int = 0

    @property
    def committed(self) -> int:
        """Steps."""
        return self.steps[-1]["step"] + 1 if self.steps else 0


class Cuts:
    """Which lines of steps are void. Made of all entries of a ledger, of which it keeps the cuts only."""

    def __init__(self, entries: Iterable[LedgerEntry]):
        found = [(entry.number, entry.values["step"]) for entry in entries if entry.kind == CUT and entry.damaged is None]
        self._cuts: list[tuple[int, int]] = []
        for number, step in reversed(found):  # a later cut that reaches further back makes an earlier one's question idle
            self._cuts.append((number, min(step, self._cuts[-1][1]) if self._cuts else step))
        self._cuts.reverse()

    def voids(self, entry: LedgerEntry) -> bool:
        """Whether a line that comes after it says that this step is to be done again."""
        later = next((step for number, step in self._cuts if number > entry.number), None)
        return later is not None and entry.values["step"] >= later


def entries(lines: Iterable[str]) -> Iterator[LedgerEntry]:
    """The whole lines of a ledger. One is damaged if it is not that of a kind, or if the next one was written after another."""
    before: LedgerEntry | None = None
    digest = ""
    for number, text in enumerate(lines, 1):
        entry = _entry(number, text)
        previous = entry.values.get("previous")
        if before is not None:
            changed = previous is not None and previous != digest and before.damaged is None
            yield before if not changed else LedgerEntry(
                before.number, before.kind, before.values,
                f"it was changed, or a line after it was removed: line {number} was written after another")
        elif previous:
            entry = LedgerEntry(number, entry.kind, entry.values, "the lines before it were removed")
        before, digest = entry, line_hash(text)
    if before is not None:
        yield before


def read(lines: Iterable[str]) -> Ledger:
    """What the whole lines of a ledger say. Raises LedgerDamaged."""
    steps: list[Mapping[str, Any]] = []
    epoch = generation = furthest = 0
    newest = ""

    def hashed() -> Iterator[str]:
        nonlocal newest
        for text in lines:
            newest = line_hash(text)
            yield text

    for entry in entries(hashed()):
        if entry.damaged is not None:
            raise LedgerDamaged(f"line {entry.number} is damaged: {entry.damaged}")
        generation = max(generation, entry.values.get("generation", 0))
        if entry.kind == STEP:
            steps.append(entry.values)
            furthest = max(furthest, entry.values["step"] + 1)
        elif entry.kind == EPOCH:
            epoch = max(epoch, entry.values["epoch"])
        elif entry.kind == CUT:
            while steps and steps[-1]["step"] >= entry.values["step"]:
                steps.pop()
    return Ledger(tuple(steps), epoch, generation, newest, furthest)


def committed_by(tail: Iterable[str]) -> int:
    """Committed steps, by the newest lines of a ledger: what is before them is not looked at, nor is anything refused."""
    committed = 0
    for entry in entries(tail):
        if entry.kind == STEP and type(entry.values.get("step")) is int:
            committed = entry.values["step"] + 1
        elif entry.kind == CUT and type(entry.values.get("step")) is int:
            committed = entry.values["step"]
    return committed


def line_hash(text: str) -> str:
    """By which the next line names this one."""
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).hexdigest()


def chained(values: Mapping[str, Any], newest: str) -> str:
    """The line of these values, after one whose hash is `newest`."""
    return json.dumps({**values, "previous": newest})


def sequence_digest(token_bytes: bytes) -> int:
    """128-bit hash of one sequence's token ids (little-endian int32)."""
    return int.from_bytes(hashlib.blake2b(token_bytes, digest_size=16).digest(), "little")


def combine(digests: Iterable[int]) -> int:
    return sum(digests) % _MODULUS


def digest_text(digest: int) -> str:
    return f"{digest:032x}"


def _entry(number: int, text: str) -> LedgerEntry:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return LedgerEntry(number, "", {}, "it is no JSON")
    if not isinstance(values, dict):
        return LedgerEntry(number, "", {}, "it is no object")
    kind = values.get("kind", STEP)
    key = _KEYS.get(kind) if isinstance(kind, str) else None
    if key is None:
        return LedgerEntry(number, "", values, f"its kind is {kind!r}")
    for name in (key, *values.keys() & {"generation"}):
        if type(values.get(name)) is not int or values[name] < 0:
            return LedgerEntry(number, kind, values, f"it has no {name}")
    return LedgerEntry(number, kind, values)
