"""Dispatch and combine on several ranks against loops, with payloads that say where they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from actors.comm.exchange import ExpertExchange
from actors.comm.traffic import Sent
from tests.reference.exchange import Fabric, Grid, on_ranks, skewed_choice, slow_dispatch

TOP_K, HIDDEN = 3, 5
CASES = {  # experts of every rank, tokens of every rank, skew, width of a row if tokens take two hops
    "even": ([[0, 1, 2], [3, 4, 5]], [7, 7], 0.0, None),
    "scattered experts": ([[5, 0, 3], [4, 1, 2]], [6, 9], 0.0, None),
    "uneven, skewed": ([[6, 1], [0], [5, 3, 4, 2]], [11, 4, 6], 1.5, None),
    "a rank without tokens": ([[2, 0], [1, 3]], [0, 8], 0.3, None),
    "a rank without experts": ([[0, 1, 2, 3], []], [3, 5], 0.0, None),
    "no tokens at all": ([[0, 1], [2, 3]], [0, 0], 0.0, None),
    "one rank": ([[2, 0, 1, 3]], [10], 0.5, None),
    "two hops": ([[0, 1], [2, 3], [4, 5], [6, 7]], [5, 6, 7, 3], 0.0, 2),
    "two hops, scattered, uneven, skewed": ([[6, 1], [0], [5, 3, 4, 2], [7], [9], [8]], [4, 0, 6, 3, 1, 9], 0.5, 2),
    "two hops, rows of three": ([[6, 1], [0, 8], [5, 3], [4, 2], [7], [9]], [4, 2, 6, 3, 0, 5], 0.2, 3),
    "two hops, ranks without experts": ([[0, 1, 2], [], [], [3]], [3, 5, 2, 4], 0.0, 2),
    "two hops, one node has all tokens": ([[0, 1], [2, 3], [4, 5], [6, 7]], [0, 0, 6, 3], 0.0, 2),
    "two hops, no tokens at all": ([[0], [1], [2], [3]], [0, 0, 0, 0], 0.0, 2),
}


@dataclass(frozen=True)
class Case:
    """width: of a row, where tokens take two hops."""

    experts_of_rank: list[list[int]]
    choices: list[torch.Tensor]
    width: int | None

    def run(self, work, **options):
        """work(exchange, choice, rank) on every rank at once; the results by rank."""
        size = len(self.choices)
        grid = Grid(size // self.width, self.width) if self.width else None

        def on_rank(group):
            hops = grid.two_hops(group.rank) if grid else None
            return work(exchange_of(group, self.experts_of_rank, hops, **options), self.choices[group.rank], group.rank)

        return on_ranks(size, on_rank, grid)


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    return made(*CASES[request.param])


def made(experts_of_rank, tokens, skew, width):
    rng = np.random.default_rng(sum(tokens) + 1)
    experts = sum(len(e) for e in experts_of_rank)
    return Case(experts_of_rank, [skewed_choice(rng, t, experts, TOP_K, skew) for t in tokens], width)


def exchange_of(group, experts_of_rank, two_hops=None, **options):
    slots = torch.empty(sum(len(e) for e in experts_of_rank), dtype=torch.int64)
    slots[[e for experts in experts_of_rank for e in experts]] = torch.arange(len(slots))
    return ExpertExchange(group if group.size > 1 else None, slots, [len(e) for e in experts_of_rank], two_hops=two_hops,
                          **options)


def payload(source, token):
    return [1000.0 * source + token + column / 8 for column in range(HIDDEN)]


def weight_of(source, token, k):
    return source + token / 64 + k / 4096


def tensors(rank, choice, dtype):
    x = torch.tensor([payload(rank, t) for t in range(len(choice))], dtype=dtype).view(-1, HIDDEN)
    w = torch.tensor([[weight_of(rank, t, k) for k in range(TOP_K)] for t in range(len(choice))]).view(-1, TOP_K)
    return x, w.to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_expert_gets_its_rows_and_their_weights(case, dtype):
    def work(exchange, choice, rank):
        return exchange.dispatch(*tensors(rank, choice, dtype), choice)

    expected = slow_dispatch(case.choices, case.experts_of_rank)
    for sent, by_expert in zip(case.run(work), expected):
        origins = [origin for rows in by_expert for origin in rows]
        assert sent.counts == [len(rows) for rows in by_expert]
        assert sent.rows.dtype == dtype
        assert torch.equal(sent.rows, torch.tensor([payload(s, t) for s, t, _ in origins], dtype=dtype).view(-1, HIDDEN))
        assert torch.equal(sent.weights, torch.tensor([weight_of(*o) for o in origins], dtype=sent.weights.dtype))


def test_combine_adds_up_what_the_experts_made_of_a_token(case):
    def work(exchange, choice, rank):
        sent = exchange.dispatch(*tensors(rank, choice, torch.float64), choice)
        factor = torch.tensor([e + 1.0 for e in case.experts_of_rank[rank]], dtype=torch.float64)
        factor_r = factor.repeat_interleave(torch.tensor(sent.counts, dtype=torch.int64))
        return exchange.combine(sent.rows * factor_r.unsqueeze(1), sent.handle)

    for rank, home in enumerate(case.run(work)):
        total = [sum(e + 1 for e in chosen) for chosen in case.choices[rank].tolist()]
        expected = [[factor * value for value in payload(rank, token)] for token, factor in enumerate(total)]
        assert torch.equal(home, torch.tensor(expected, dtype=torch.float64).view(-1, HIDDEN))


def test_backwards_are_the_adjoints(case):
    """<A x, y> = <x, A' y>, summed over the ranks, for dispatch (rows and weights) and for combine."""

    def work(exchange, choice, rank):
        make = torch.Generator().manual_seed(rank)

        def random(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        x, w = random(len(choice), HIDDEN), random(len(choice), TOP_K)
        sent = exchange.dispatch(x, w, choice)
        y, v = random(*sent.rows.shape), random(len(sent.rows))
        grad_x, grad_w = exchange.dispatch_backward(y, v, sent.handle)
        home, z = exchange.combine(y, sent.handle), random(len(choice), HIDDEN)
        back = exchange.combine_backward(z, sent.handle)
        return [float((a * b).sum()) for a, b in (
            (sent.rows, y), (x, grad_x), (sent.weights, v), (w, grad_w), (home, z), (y, back))]

    rows, rows_t, weights, weights_t, combined, combined_t = np.sum(case.run(work), axis=0)
    assert rows == pytest.approx(rows_t, abs=1e-9)
    assert weights == pytest.approx(weights_t, abs=1e-9)
    assert combined == pytest.approx(combined_t, abs=1e-9)


def expert(e, rows):
    """Something nonlinear that depends on the expert."""
    return torch.tanh(rows * (0.3 + 0.1 * e)) + 0.05 * e * rows


def layer_of(exchange, choice, rank, experts, announced=False):
    """Forward and backward of weighted experts between dispatch and combine: (y, gradient of x, gradient of the weights)."""
    x, w, z = inputs(len(choice), rank)
    before = exchange.announce(choice) if announced else None
    if announced:
        exchange.announce = None  # once is enough
    sent = exchange.dispatch(x, w, choice, before)
    rows, weights = sent.rows.detach().requires_grad_(), sent.weights.detach().requires_grad_()
    parts = [expert(e, part) for e, part in zip(experts, rows.split(sent.counts))]
    out = (torch.cat(parts) if parts else rows) * weights.unsqueeze(1)
    y = exchange.combine(out.detach(), sent.handle)
    torch.autograd.backward(out, exchange.combine_backward(z, sent.handle))
    return y, *exchange.dispatch_backward(rows.grad, weights.grad, sent.handle)


def inputs(tokens, rank):
    """x [t, HIDDEN], routing weights [t, TOP_K], gradient of the output [t, HIDDEN]; float64."""
    make = torch.Generator().manual_seed(50 + rank)
    x, z = (torch.randn(tokens, HIDDEN, generator=make, dtype=torch.float64) for _ in range(2))
    return x, torch.rand(tokens, TOP_K, generator=make, dtype=torch.float64), z


@pytest.mark.parametrize("announced", [False, True])
def test_a_layer_is_what_one_process_computes_token_by_token(case, announced):
    found = case.run(lambda exchange, choice, rank: layer_of(exchange, choice, rank, case.experts_of_rank[rank], announced))
    for rank, (y, grad_x, grad_w) in enumerate(found):
        x, w, z = inputs(len(case.choices[rank]), rank)
        x.requires_grad_(), w.requires_grad_()
        rows = [sum((w[t, k] * expert(e, x[t]) for k, e in enumerate(chosen)), torch.zeros(HIDDEN, dtype=torch.float64))
                for t, chosen in enumerate(case.choices[rank].tolist())]
        expected = torch.stack(rows) if rows else x * 1
        expected.backward(z) if len(w) else None
        torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
        for ours, theirs in ((grad_x, x.grad), (grad_w, w.grad)):
            torch.testing.assert_close(ours, theirs if theirs is not None else torch.zeros_like(ours), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if "two hops" in name])
def test_two_hops_are_one_hop(name):
    """Bit for bit what only travels; what is summed in another order, to rounding."""
    case = made(*CASES[name])

    def work(exchange, choice, rank):
        x, w, z = inputs(len(choice), rank)
        sent = exchange.dispatch(x, w, choice)
        y = torch.sin(sent.rows * 3)
        grad_x, grad_w = exchange.dispatch_backward(y, sent.weights * 2, sent.handle)
        moved = sent.rows, sent.weights, torch.tensor(sent.counts), grad_w, exchange.combine_backward(z, sent.handle)
        return moved, (grad_x, exchange.combine(y, sent.handle))

    for (moved, summed), (moved_1, summed_1) in zip(case.run(work), replace(case, width=None).run(work)):
        assert all(torch.equal(a, b) for a, b in zip(moved, moved_1, strict=True))
        torch.testing.assert_close(summed, summed_1, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[1]) > 1])
def test_bytes_are_those_of_the_rows_that_must_travel(name, dtype):
    """Across nodes: one row for each token and node (two hops), or each token and rank (one hop)."""
    case = made(*CASES[name])
    size, slots = len(case.choices), max(map(len, case.experts_of_rank))
    width = case.width or 1
    rank_of = {e: rank for rank, experts in enumerate(case.experts_of_rank) for e in experts}
    nodes = tuple(f"node {rank // width}" for rank in range(size))

    def work(exchange, choice, rank):
        stages, before = [], exchange.traffic.sent
        x, w = tensors(rank, choice, dtype)
        sent = exchange.dispatch(x, w, choice)
        for run in (lambda: None, lambda: exchange.combine(sent.rows, sent.handle), lambda: exchange.combine_backward(x, sent.handle),
                    lambda: exchange.dispatch_backward(sent.rows, sent.weights, sent.handle)):
            run()
            after = exchange.traffic.sent
            stages.append(after - before)
            before = after
        return stages

    found = case.run(work, nodes=nodes)
    reached = {(rank, t, rank_of[e]) for rank, choice in enumerate(case.choices)
               for t, chosen in enumerate(choice.tolist()) for e in chosen}
    crossed = {(rank, t, target // width) for rank, t, target in reached if target // width != rank // width}
    # who forwards a token: its own rank, or the one with its index on the target's node
    forwarded = {(rank, t, target) for rank, t, target in reached if target % width != rank % width}
    h, number = HIDDEN * dtype.itemsize, 8 if dtype == torch.float64 else 4
    weighed_across, weighed_inside = h + width * slots * number, h + slots * number
    for stage, (across, inside) in enumerate([(weighed_across, weighed_inside), (h, h), (h, h), (weighed_across, weighed_inside)]):
        total = sum((stages[stage] for stages in found), Sent())
        assert total == Sent(len(crossed) * across, len(forwarded) * inside if case.width else 0), stage


def test_every_wrong_number_is_refused():
    with pytest.raises(ValueError, match="experts_per_rank = \\[3\\]"):
        ExpertExchange(None, torch.arange(4), [3])
    with pytest.raises(ValueError, match="2 rows of 2 ranks are not 2 ranks"):
        ExpertExchange(Fabric(2).group(0), torch.arange(4), [2, 2], two_hops=Grid(2, 2).two_hops(0))
