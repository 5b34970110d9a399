"""The commit protocol's record: which step is committed, by which generation, with which sequences.

A step is committed once its line is written; from then on its result survives the loss of any one node. The digest is
the sum, modulo 2**128, of one hash per sequence that ranks ran forward and backward: it does not depend on the layout,
and a sequence dropped, doubled or replaced changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_MODULUS = 1 << 128


@dataclass(frozen=True)
class LedgerLine:
    """`first` and `count`: the positions [first, first + count) of the seeded order that made up the step."""

    step: int
    generation: int
    first: int
    count: int
    digest: str
    loss: float


def sequence_digest(token_bytes: bytes) -> int:
    """128-bit hash of one sequence's token ids (little-endian int32)."""
    return int.from_bytes(hashlib.blake2b(token_bytes, digest_size=16).digest(), "little")


def combine(digests: Iterable[int]) -> int:
    return sum(digests) % _MODULUS


def digest_text(digest: int) -> str:
    return f"{digest:032x}"


def to_json(line: LedgerLine, change: dict[str, Any] | None = None) -> str:
    """One line of `ledger.jsonl`; `change`: layout, schedule and placement, where they are new with this step."""
    return json.dumps(asdict(line) | (change or {}))
