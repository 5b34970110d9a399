"""Driving rank processes from tests: a tiny run, its data, and the state that its ranks hold."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.calls.messages import Assignment, Outcome, Start
from actors.data.batching import Batch
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from actors.runtime.rank import Rank
from actors.state.checkpoint import BIAS, EXP_AVG, EXP_AVG_SQ, MASTER
from actors.state.generations import Held
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.data import order
from orchestrator.layout.layout import Layout, choose
from orchestrator.layout.placement import Placement, default_placement
from orchestrator.protocol.members import Member
from orchestrator.told.lines import to_json
from orchestrator.topology import virtual_nodes

TIMEOUT_SECONDS = 120.0
VOCABULARY, LENGTH = 61, 8
TINY = {
    "model": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 4, "first_k_dense_replace": 1,
              "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
              "n_group": 4, "topk_group": 2,
              "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
              "v_head_dim": 8, "initializer_range": 0.05},
    "data": {"sequence_length": LENGTH},
    "training": {"steps": 6, "batch_sequences": 8, "microbatch_sequences": 1, "dtype": "float64", "validate_every": 0,
                 "validation_sequences": 0, "step_timeout_seconds": 40},
    "optimizer": {"learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every": 0},
    "elastic": {"silence_seconds": 15},  # the host is busy: silence of others than the frozen is no loss
}
LAYOUTS = {  # name: (pipeline, expert, data, nodes, ranks per node)
    "PP2xEP2": (2, 2, 1, 2, 2), "PP4": (4, 1, 1, 2, 2), "EP4": (1, 4, 1, 4, 1), "EP3": (1, 3, 1, 3, 1),
    "PP2xDP2": (2, 1, 2, 2, 2), "EP2xDP2": (1, 2, 2, 4, 1), "two hops": (1, 4, 1, 2, 2),
    "PP2": (2, 1, 1, 2, 1), "one node": (1, 2, 1, 1, 2), "one rank": (1, 1, 1, 1, 1),
}
EIGHT_RANKS = {"PP2xEP4": (2, 4, 1, 4, 2)}  # more than the session's processes


class Host(Rank):
    """A Rank that also runs what a test hands it."""

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self, *arguments)


def host(config: RunConfig) -> Host:
    return Host(config, "127.0.0.1")


def configured(name: str = "PP2xEP2", *overrides: str) -> tuple[RunConfig, Layout]:
    """The tiny run on a layout of LAYOUTS."""
    pipeline, expert, data, nodes, per_node = (LAYOUTS | EIGHT_RANKS)[name]
    config = parse({key: dict(section) for key, section in TINY.items()},
                   [f"layout.pipeline={pipeline}", f"layout.expert={expert}", f"layout.data={data}", *overrides])
    return config, choose(virtual_nodes(nodes, per_node), config.layout, config.model, config.stages)


_NUMBERS = itertools.count(1000)


@cache
def meeting_place() -> dist.TCPStore:
    """One for all tests: connecting to one looks names up, which takes seconds where DNS does."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def placement_of(config: RunConfig, layout: Layout) -> Placement:
    """The one that a run begins with."""
    return default_placement(config.model, layout, config.layout.layers_per_stage, config.layout.group_parts)


def form(ranks: ProcessRanks, config: RunConfig, layout: Layout, generation: int | None = None) -> None:
    """A generation without a Trainer, of a number that no other has; its ranks have no state yet."""
    generation = next(_NUMBERS) if generation is None else generation
    ranks.enlist([Member(place.node, place.local) for place in layout.places])  # a run before may have left others seated
    store = meeting_place()
    address, prefix = ("127.0.0.1", store.port), f"formation-{store.add('formations', 1)}"
    placement = placement_of(config, layout)
    places = [(Assignment(generation, rank, config, layout, placement, address, prefix),) for rank in range(layout.size)]
    ranks.start("form", places).results(TIMEOUT_SECONDS)


def on_all(ranks: ProcessRanks, function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """function(host, *arguments) on ranks 0..size-1."""
    return ranks.start("do", [(function, *arguments)] * size).results(TIMEOUT_SECONDS)


def batch_of(config: RunConfig, step: int) -> Batch:
    """Tokens that depend on the seed and the step; the last row is short, as that of a split may be."""
    rows = order.batch_size(config.training, step) if step >= 0 else 6
    tokens = np.random.default_rng([config.run.seed, step + 1]).integers(0, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
    valid = np.full(rows, LENGTH + 1, np.int32)
    valid[-1] = 5
    tokens[-1, 5:] = 0
    return Batch(step, tokens, valid)


class Batches:
    """`before[step]()` runs between two steps: when the one before is committed and all that is due after it is done, and before any
    rank is called for this one. On the thread that reads batches; what it raises ends the run. reached(step): waits for that moment.
    """

    def __init__(self, config: RunConfig, step: int, before: Mapping[int, Callable[[], Any]], reached: Callable[[int], None],
                 failed: Callable[[Exception], None]):
        self._config, self._step, self._before, self._reached, self._failed = config, step, before, reached, failed

    def next(self) -> Batch:
        if (hook := self._before.get(self._step)) is not None:
            try:
                self._reached(self._step)
                hook()
            except Exception as error:
                self._failed(error)
        self._step += 1
        return batch_of(self._config, self._step - 1)

    def close(self) -> None:
        pass


@dataclass
class Run:
    """What a run told. `steps`: metrics of each. `events`: as events.jsonl has them."""

    outcome: Outcome | None = None
    error: Exception | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    trainer: Trainer | None = None
    folder: RunFolder | None = None

    @property
    def losses(self) -> list[tuple[float, ...]]:
        return [(s["loss"], s["mtp_loss"], s["balance_loss"], s["gradient_norm"]) for s in self.steps]

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def train(ranks: Any, folder: Path | RunFolder, config: RunConfig, layout: Layout, *, stop_after: int | None = None,
          before: Mapping[int, Callable[[], Any]] | None = None, run: Run | None = None,
          watch: Callable[[str, Any], None] = lambda kind, values: None, start: Start = Start()) -> Run:
    """Run a Trainer to its end in `folder`; what it raises is in the result. `run`: an empty one, where this is told. `start`: ranks
    that another one has left behind are as that left them."""
    found, failed = Run() if run is None else run, []

    def note(kind: str, values: Any) -> None:
        if kind == "event":
            found.events.append(to_json(values))
            if values.name in ("generation", "placement"):
                ranks.seat(trainer.seated)  # whom tests mean by a rank's number
        elif kind == "step":
            found.steps.append(values)
            if values["step"] + 1 == stop_after:
                trainer.stop()
        watch(kind, values)

    def reached(step: int) -> None:
        trainer.wait_until(lambda run: run.phase.name == "fetching batch" and run.committed == step, TIMEOUT_SECONDS)

    def hook_failed(error: Exception) -> None:
        if found.outcome is None and found.error is None:
            failed.append(error)
            trainer.stop()

    held_out = batch_of(config, -1) if config.training.validation_sequences else None
    sources = Sources(lambda step: Batches(config, step, before or {}, reached, hook_failed), lambda: held_out)
    folder = folder if isinstance(folder, RunFolder) else RunFolder(str(folder), "run")
    if not start.left_behind:
        forget(ranks)
    trainer = Trainer(config, layout, ranks, folder, sources, watch=note, store=meeting_place(), start=start)
    found.trainer, found.folder = trainer, folder
    try:
        found.outcome = trainer.run()
    except Exception as error:
        found.error = error
    if failed:
        found.error = failed[0]
    return found


def forget(ranks: ProcessRanks) -> None:
    """As processes are that have just been made: what they have of the run before is none of the next one's business."""
    count = len(ranks._processes)
    ranks.enlist([Member("", number) for number in range(count)])
    on_all(ranks, _forget, count)


def _forget(host: Host) -> None:
    host.close()
    host._held = Held()
    host.authority.attached("", 0)


def owned_state(host: Host) -> list[tuple[str, str, int, int, torch.Tensor, bool]]:
    """(name, kind, start, stop, values, is primary) of all that a rank owns, and its gate biases."""
    found = []
    for owned in host._held.current.shards:
        primary = owned.bucket.owners[owned.shard][0] == host._assignment.rank
        for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
            for kind, flat in ((MASTER, owned.master), (EXP_AVG, owned.moment(EXP_AVG)), (EXP_AVG_SQ, owned.moment(EXP_AVG_SQ))):
                found.append((spec.name, kind, start, stop, flat[offset : offset + stop - start].clone(), primary))
    for layer, bias in host.biases.items():
        found.append((str(layer), BIAS, 0, bias.numel(), bias.clone(), False))
    return found


def state(ranks: ProcessRanks, layout: Layout) -> dict[tuple[str, str], torch.Tensor]:
    """Every master weight, moment and bias by (name, kind), flat; first asserts that all owners hold the same bits."""
    seen: dict[tuple[str, str, int, int], torch.Tensor] = {}
    primaries: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for of_rank in on_all(ranks, owned_state, layout.size):
        for name, kind, start, stop, values, primary in of_rank:
            assert torch.equal(seen.setdefault((name, kind, start, stop), values), values), f"owners differ: {name} {kind}"
            if primary or kind == BIAS:
                primaries.setdefault((name, kind), []).append((start, stop))
    return {key: torch.cat([seen[*key, *piece] for piece in sorted(set(pieces))]) for key, pieces in primaries.items()}


def same(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> bool:
    """Bit for bit. Prints what is not."""
    apart = {key: float((value - b[key]).abs().max()) for key, value in a.items() if key in b and not torch.equal(value, b[key])}
    print({key: apart[key] for key in list(apart)[:9]}, f"{len(apart)} of {len(a)} differ", *(a.keys() ^ b.keys()))
    return a.keys() == b.keys() and not apart


def furthest(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> float:
    """Largest absolute difference of any value."""
    assert a.keys() == b.keys()
    return max(float((value - b[key]).abs().max()) for key, value in a.items())


def digest_by_hand(batch: Batch) -> str:
    total = sum(int.from_bytes(hashlib.blake2b(b"".join(int(t).to_bytes(4, "little", signed=True) for t in row),
                                               digest_size=16).digest(), "little") for row in batch.tokens)
    return format(total % 2**128, "032x")
