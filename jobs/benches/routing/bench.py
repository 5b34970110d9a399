"""Routing: what crosses nodes, what choosing and permuting costs, how evenly the ranks are loaded, and what moving experts takes.

Every rank is a process; all are one EP group, and DeepSeek-V3's gate chooses among random affinities. Bytes a token across nodes
are held against the expected number of nodes (two hops) or ranks on other nodes (one hop) times the bytes of a row.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field

from actors.hosts.processes import ProcessRanks
from actors.hosts.seated_answers import call
from jobs.benches.routing.expected import Reach, limited, published_packing, unlimited
from jobs.benches.routing.gate import measure, peer_is_here
from jobs.benches.routing.move import MoveFound, MoveTask
from jobs.benches.routing.rank import RoutingReport, Task, routing_rank
from orchestrator.config.run_config import ModelConfig, Real, RunConfig, Section, parse
from orchestrator.layout.balance import in_order, unevenness
from orchestrator.layout.layout import Layout, choose
from orchestrator.layout.placement import Placement, balanced_placement, default_placement, moves
from orchestrator.refusal import ConfigError
from orchestrator.topology import virtual_nodes

EXPERTS, GROUPS, TOP_K = 256, 8, 8
NEAR, NO_DEARER, NO_LESS_EVEN = 0.02, 1.0, 1.0
"""Bars: bytes within this share of the expected; ours / transformers; our unevenness / the published packing's."""
_TIMEOUT_SECONDS = 300.0


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    nodes: Literal[2, 4, 8] = Field(8, description="each holds as many of the 8 expert groups")
    ranks_per_node: Literal[1, 2, 4] = 2
    tokens: int = Field(512, ge=1, description="of a rank")
    hidden: int = Field(256, ge=1, description="channels of a token that travels, FP32")
    limits: list[int] = Field([8, 4, 2], min_length=1, description="expert groups that a token may use (topk_group)")
    monte_carlo: int = Field(20_000, ge=1, description="tokens that the expectation with a limit is computed from")
    skew: Real = Field(0.7, ge=0, description="standard deviation of the experts' popularity, in logits")
    gate_tokens: int = Field(4096, ge=1)
    gate_hidden: list[int] = Field([256, 1024], description="hidden sizes that gate and permutation are timed with")
    repeats: int = Field(15, ge=1, description="of each timing")
    moves: int = Field(3, ge=1, description="times that the experts of a layer are moved to their new places and back")
    intermediate: int = Field(64, ge=1, description="moe_intermediate_size of the experts that are moved")


@dataclass(frozen=True)
class Case:
    limit: int
    hops: int

    @property
    def name(self) -> str:
        return f"limit {self.limit}, {self.hops} {'hop' if self.hops == 1 else 'hops'}"


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Bytes, costs and loads, and whether the bars hold. Raises ConfigError."""
    started = time.perf_counter()
    if settings.gate_hidden and not peer_is_here():
        raise ConfigError("gate_hidden", settings.gate_hidden, "[]: transformers, the peer, is not installed here")
    if wrong := [limit for limit in settings.limits if not 1 <= limit <= GROUPS]:
        raise ConfigError("limits", wrong[0], f"1 to {GROUPS} expert groups")
    layout = _layout(settings)
    plain = in_order(EXPERTS, GROUPS, settings.nodes, settings.ranks_per_node)
    with ProcessRanks(config, layout.size, routing_rank, start_method="forkserver") as ranks:
        call(ranks, "open", [(rank, layout, port) for port in [_free_port()] for rank in range(layout.size)], _TIMEOUT_SECONDS)
        across = {}
        for case in _cases(settings):
            task = Task(_model(settings, case.limit), plain, case.hops, settings.tokens, 0.0, seed=1)
            across[case.name] = crossing(settings, case, _route(ranks, task))
            print(f"{case.name}: {across[case.name]}", file=sys.stderr, flush=True)
        load, before, after = _skewed(ranks, settings, layout, plain)
        moved = moving(settings, call(ranks, "move", [(MoveTask(_layer(settings), before, after, settings.moves),)] * ranks.size,
                                      _TIMEOUT_SECONDS), len(moves(before, after)))
        print(f"moved: {moved}", file=sys.stderr, flush=True)
    gates = [measure(_model(settings, 4, hidden), settings.gate_tokens, settings.repeats) for hidden in settings.gate_hidden]
    checks = verdicts(across, gates, load, moved)
    return {"settings": settings.model_dump(),
            "seconds": {f"gate and permutation, hidden {gate['hidden']}": gate["seconds"] for gate in gates}
            | {"move": moved["seconds"]},
            "ratio": {f"ours/transformers, hidden {gate['hidden']}": gate["ours/transformers"] for gate in gates}
            | {"move/stream": moved["move/stream"]},
            "across": across, "gate": [{key: value for key, value in gate.items() if key != "seconds"} for gate in gates],
            "load": load, "move": {key: value for key, value in moved.items() if key != "seconds"},
            "bars": {"bytes": NEAR, "ours/transformers": NO_DEARER, "ours/published": NO_LESS_EVEN},
            "run_seconds": time.perf_counter() - started, "checks": checks, "valid": all(checks.values())}


def crossing(settings: Settings, case: Case, found: list[RoutingReport]) -> dict[str, Any]:
    """Bytes a token that all ranks sent across nodes, against the expectation."""
    tokens, reach = settings.tokens * len(found), _reach(settings, case.limit)
    rows = reach.nodes if case.hops == 2 else reach.ranks
    slots = EXPERTS // settings.nodes // (1 if case.hops == 2 else settings.ranks_per_node)
    row_bytes = settings.hidden * 4
    header = slots * 4  # a weight for each slot that the row may be for
    measured = sum(one.dispatched.across for one in found) / tokens
    combined = sum(one.combined.across for one in found) / tokens
    return {"dispatch_bytes": measured, "combine_bytes": combined,
            "inside_bytes": sum(one.dispatched.inside + one.combined.inside for one in found) / tokens,
            "expected_dispatch_bytes": rows * (row_bytes + header), "expected_combine_bytes": rows * row_bytes,
            "rows": combined / row_bytes, "expected_rows": rows, "expectation": reach.source,
            "measured/expected": [measured / (rows * (row_bytes + header)), combined / (rows * row_bytes)],
            "token_and_node_pairs": sum(one.crossings for one in found) / tokens, "right": all(one.right for one in found)}


def moving(settings: Settings, found: list[MoveFound], experts: int) -> dict[str, Any]:
    """A move takes as long as its slowest rank. The state is master weights and both moments, FP32, each on two ranks."""
    seconds = {name: [max(times) for times in zip(*(getattr(one, attribute) for one in found))]
               for name, attribute in (("move", "seconds"), ("stream", "stream"))}
    total, median = found[0].bytes_moved, {name: statistics.median(taken) for name, taken in seconds.items()}
    return {"seconds": seconds, "plan_seconds": max(one.plan_seconds for one in found), "experts": experts, "bytes": total,
            "moved/needed": total / found[0].bytes_needed if total else 1.0,
            "bytes_per_second": {name: total / taken for name, taken in median.items()},
            "move/stream": median["move"] / median["stream"], "right": all(one.right for one in found)}


def verdicts(across: dict[str, dict[str, Any]], gates: list[dict[str, Any]], load: dict[str, Any],
             moved: dict[str, Any]) -> dict[str, bool]:
    """The bars, by what they ask."""
    checks = {f"{name}: bytes within {NEAR:.0%} of the expected": all(abs(r - 1) <= NEAR for r in found["measured/expected"])
              for name, found in across.items()}
    checks |= {f"{name}: every token came home": found["right"] for name, found in across.items()}
    checks |= {f"{name}: a token crosses to a node once": found["rows"] == found["token_and_node_pairs"]
               for name, found in across.items() if name.endswith("hops")}
    checks |= {f"hidden {gate['hidden']}: gate and permutation no dearer than transformers' gate and index_select":
               gate["same"] and gate["ours/transformers"] <= NO_DEARER for gate in gates}
    return checks | {"re-placement at least as even as the published packing": load["ours/published"] <= NO_LESS_EVEN,
                     "moved experts arrived whole": moved["right"]}


def _skewed(ranks: ProcessRanks, settings: Settings, layout: Layout,
            plain: tuple[tuple[int, ...], ...]) -> tuple[dict[str, Any], Placement, Placement]:
    """Busiest rank / mean with popular and unpopular experts: in order, then placed for the load that was measured; and the two
    placements."""
    task = Task(_model(settings, 4), plain, 2 if settings.ranks_per_node > 1 else 1, settings.tokens, settings.skew, seed=2)
    before = _route(ranks, task)
    load = torch.tensor([one.load for one in before]).sum(0).tolist()
    first = default_placement(_layer(settings), layout)
    second = balanced_placement(_layer(settings), layout, first, {0: load})
    placed = second.at(0, 0, 0)
    published = published_packing(load, GROUPS, settings.nodes, settings.ranks_per_node)
    again, later = _route(ranks, replace(task, experts=placed)), _route(ranks, replace(task, experts=placed, seed=3))
    if not all(one.right for one in (*before, *again, *later)):
        raise RuntimeError("skewed: a token did not come home")
    if (measured := _max_over_mean(again)) != unevenness(load, placed):
        raise RuntimeError(f"re-placed: the ranks received {measured} x the mean, their experts' load is {unevenness(load, placed)}")
    return {"max/mean": {"before": _max_over_mean(before), "after": measured, "after, other tokens": _max_over_mean(later),
                         "published packing": published, "experts": max(load) * len(load) / sum(load)},
            "ours/published": measured / published}, first, second


def _max_over_mean(found: list[RoutingReport]) -> float:
    rows = [one.received for one in found]
    return max(rows) * len(rows) / sum(rows)


def _cases(settings: Settings) -> list[Case]:
    return [Case(limit, hops) for limit, hops in itertools.product(settings.limits, (1, 2))
            if hops == 1 or settings.ranks_per_node > 1]


def _reach(settings: Settings, limit: int) -> Reach:
    nodes, ranks = settings.nodes, settings.nodes * settings.ranks_per_node
    if limit == GROUPS:
        return unlimited(EXPERTS, TOP_K, nodes, ranks)
    return limited(EXPERTS, GROUPS, limit, TOP_K, nodes, ranks, settings.monte_carlo)


def _model(settings: Settings, limit: int, hidden: int | None = None) -> ModelConfig:
    return ModelConfig(n_routed_experts=EXPERTS, n_group=GROUPS, topk_group=limit, num_experts_per_tok=TOP_K,
                       hidden_size=hidden or settings.hidden)


def _layer(settings: Settings) -> ModelConfig:
    """One layer with experts, and nothing else that is placed."""
    return _model(settings, 4).model_copy(update={
        "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0,
        "moe_intermediate_size": settings.intermediate})


def _layout(settings: Settings) -> Layout:
    size = settings.nodes * settings.ranks_per_node
    config = parse({"model": {"n_routed_experts": EXPERTS, "n_group": GROUPS, "topk_group": 4, "num_experts_per_tok": TOP_K},
                    "layout": {"pipeline": 1, "expert": size, "data": 1, "shape": [1, settings.ranks_per_node]},
                    "schedule": {"kind": "1f1b"}})
    return choose(virtual_nodes(settings.nodes, settings.ranks_per_node), config.layout, config.model, config.stages)


def _route(ranks: ProcessRanks, task: Task) -> list[RoutingReport]:
    return call(ranks, "route", [(task,)] * ranks.size, _TIMEOUT_SECONDS)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
