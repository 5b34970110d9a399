"""One rank of the routing bench: it draws tokens and affinities, chooses experts, and sends the tokens there and back."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from actors.comm.exchange import ExpertExchange, TwoHops
from actors.comm.groups import Generation
from actors.comm.traffic import Sent
from actors.model.gate import choose_experts, expert_weights
from actors.runtime.process_setup import settle
from jobs.benches.routing.move import MoveFound, MoveTask, move
from orchestrator.config.run_config import ModelConfig, RunConfig
from orchestrator.layout.layout import Layout

_TIMEOUT_SECONDS = 60.0


def routing_rank(config: RunConfig) -> RoutingRank:
    """What a process hosts."""
    return RoutingRank()


@dataclass(frozen=True)
class Task:
    """What every rank does once. skew: standard deviation of what is added to the gate's logits, by expert; 0: all alike.

    experts: of each rank, in slot order. hops: 1 or 2.
    """

    model: ModelConfig
    experts: tuple[tuple[int, ...], ...]
    hops: int
    tokens: int
    skew: float
    seed: int


@dataclass(frozen=True)
class RoutingReport:
    """What one rank did. crossings: pairs of a token and another node that it must reach. received: rows for its experts.

    right: combine brought back, for every token, what its experts' outputs add up to.
    """

    dispatched: Sent
    combined: Sent
    crossings: int
    received: int
    load: list[int]
    right: bool


class RoutingRank:
    """Answers calls one at a time. `open` comes first."""

    def __init__(self) -> None:
        settle()

    def open(self, rank: int, layout: Layout, port: int) -> None:
        """Make the groups of the only EP group, for one hop and for two."""
        self._rank, self._layout, place = rank, layout, layout.places[rank]
        store = dist.TCPStore("127.0.0.1", port, layout.size, is_master=rank == 0,
                              timeout=datetime.timedelta(seconds=_TIMEOUT_SECONDS))
        self._generation = Generation(0, rank, torch.device("cpu"), "127.0.0.1", _TIMEOUT_SECONDS)
        ranks = layout.expert_group(0, 0)
        rails = [layout.rail(0, 0, w) for w in range(layout.width)]
        insides = [layout.inside(row, 0) for row in range(layout.rows)]
        self._generation.create(store, [tuple(range(layout.size)), ranks, *rails, *insides])
        self._group = self._generation.group(ranks)
        self._two_hops = TwoHops(self._generation.group(rails[place.width]), self._generation.group(insides[place.row]))

    def abort(self) -> None:
        self._generation.abort()

    def route(self, task: Task) -> RoutingReport:
        """Dispatch, experts that give back what they get, combine. Bytes are those of what was handed to the sockets."""
        model, size = task.model, self._layout.size
        place_of_expert = torch.empty(model.n_routed_experts, dtype=torch.int64)
        place_of_expert[[e for experts in task.experts for e in experts]] = torch.arange(model.n_routed_experts)
        exchange = ExpertExchange(self._group, place_of_expert, [len(experts) for experts in task.experts],
                                  two_hops=self._two_hops if task.hops == 2 else None,
                                  nodes=tuple(place.node for place in self._layout.places))
        make = torch.Generator().manual_seed(task.seed * size + self._rank)
        affinity_te = (torch.randn(task.tokens, model.n_routed_experts, generator=make) + popularity(task, model)).sigmoid()
        choice_tk = choose_experts(affinity_te, torch.zeros(model.n_routed_experts), model)
        # whole numbers, so that sums are exact in any order
        x_th = torch.randint(-8, 9, (task.tokens, model.hidden_size), generator=make).float()
        sent = exchange.dispatch(x_th, expert_weights(affinity_te, choice_tk, model), choice_tk)
        dispatched = exchange.traffic.sent
        y_th = exchange.combine(sent.rows, sent.handle)
        return RoutingReport(dispatched, exchange.traffic.sent - dispatched,
                             self._crossings(choice_tk, task.experts), sum(sent.counts),
                             torch.bincount(choice_tk.flatten(), minlength=model.n_routed_experts).tolist(),
                             torch.equal(y_th, x_th * model.num_experts_per_tok))

    def move(self, task: MoveTask) -> MoveFound:
        """The experts' state from one placement to another and back, timed."""
        return move(task, self._rank, self._layout, self._generation.group(tuple(range(self._layout.size))))

    def _crossings(self, choice_tk: torch.Tensor, experts: Sequence[Sequence[int]]) -> int:
        """Counted straight from the choice, not from what travels."""
        node_of = {e: self._layout.places[rank].node for rank, held in enumerate(experts) for e in held}
        here = self._layout.places[self._rank].node
        return sum(len({node_of[e] for e in chosen} - {here}) for chosen in choice_tk.tolist())


def popularity(task: Task, model: ModelConfig) -> torch.Tensor:
    """What is added to every expert's logit, the same for all ranks."""
    return task.skew * torch.randn(model.n_routed_experts, generator=torch.Generator().manual_seed(1))
