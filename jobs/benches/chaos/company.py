"""What a run under chaos is to whoever strikes it: a company of nodes, and what can befall them."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

COPIES = 2
"""`elastic.copies` of the runs: so many nodes may be lost before their state has copies again."""
LENGTH = 32
CONFIG = {
    "model": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
              "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "num_attention_heads": 2,
              "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
              "initializer_range": 0.02},
    "training": {"steps": 100_000, "batch_sequences": 16, "microbatch_sequences": 1, "validation_sequences": 4,
                 "validate_every": 25, "dtype": "float64"},
    "optimizer": {"learning_rate": 1e-3, "final_learning_rate": 1e-3, "warmup_steps": 2},  # the same however long the run gets
    "layout": {"pipeline": 2, "expert": 2, "data": 1},
    "topology": {"virtual_nodes": 0, "ranks_per_node": "auto"},
    "elastic": {"copies": COPIES, "cool_down_seconds": 2.0, "silence_seconds": 4.0},
    "placement": {"every": 15},
    "checkpoint": {"every": 40, "keep": 3},
}
"""Of a tiny run in float64 on four nodes of one rank, by section; data and run are the company's."""


@dataclass(frozen=True, slots=True)
class FaultKind:
    """What can befall a run. nodes: how many it is done to. takes: of how many of them the state may be lost for it."""

    nodes: int
    takes: int


@dataclass(slots=True)
class Strike:
    """What was done. nodes: as events.jsonl names them; members of these may be lost for it, of no others. began, ended: seconds
    since the epoch; ended: when its cause was gone (thawed, restored, replaced), None: not yet."""

    kind: str
    takes: int
    began: float
    nodes: tuple[str, ...]
    ended: float | None = None


class RunEnded(RuntimeError):
    """The run ended, or does not go on. `str()` ends with what it said last."""


class Company(Protocol):
    """A run under way on nodes, none of them ever without its name."""

    @property
    def kinds(self) -> Mapping[str, FaultKind]:
        """What can befall it now."""

    folder: Path
    """Of the run: ledger.jsonl, metrics.jsonl, events.jsonl."""
    strikes: list[Strike]

    def nodes(self) -> Sequence[str]:
        """That the run uses and that nothing has befallen of which the cause lasts. Raises RunEnded."""

    def strike(self, kind: str, nodes: Sequence[str], chance: random.Random) -> Strike:
        """Begin it, and return at once (within a second or so); what follows (a thaw, a return) happens beside. Raises RunEnded."""

    def whole(self) -> bool:
        """Nothing is under way any more and the run uses all its nodes. Raises RunEnded: it ended, or undoing a strike failed."""

    def processes(self, node: str) -> Collection[int]:
        """Of the ranks there: pids."""

    def stop(self) -> None:
        """Ask it to save and end, and wait for that. Raises RunEnded: it did otherwise."""

    def close(self) -> None:
        """End what is left of it, whatever state it is in."""
