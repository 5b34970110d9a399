"""Dispatch and combine on several ranks against loops, with payloads that say where they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.comm.exchange import ExpertExchange
from tests.reference.exchange import on_ranks, skewed_choice, slow_dispatch

TOP_K, HIDDEN = 3, 5
CASES = {  # experts of every rank, tokens of every rank, skew
    "even": ([[0, 1, 2], [3, 4, 5]], [7, 7], 0.0),
    "scattered experts": ([[5, 0, 3], [4, 1, 2]], [6, 9], 0.0),
    "uneven, skewed": ([[6, 1], [0], [5, 3, 4, 2]], [11, 4, 6], 1.5),
    "a rank without tokens": ([[2, 0], [1, 3]], [0, 8], 0.3),
    "a rank without experts": ([[0, 1, 2, 3], []], [3, 5], 0.0),
    "no tokens at all": ([[0, 1], [2, 3]], [0, 0], 0.0),
    "one rank": ([[2, 0, 1, 3]], [10], 0.5),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    experts_of_rank, tokens, skew = CASES[request.param]
    rng = np.random.default_rng(sum(tokens) + 1)
    experts = sum(len(e) for e in experts_of_rank)
    return experts_of_rank, [skewed_choice(rng, t, experts, TOP_K, skew) for t in tokens]


def exchange_of(group, experts_of_rank):
    slots = torch.empty(sum(len(e) for e in experts_of_rank), dtype=torch.int64)
    slots[[e for experts in experts_of_rank for e in experts]] = torch.arange(len(slots))
    return ExpertExchange(group if group.size > 1 else None, slots, [len(e) for e in experts_of_rank])


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
    experts_of_rank, choices = case

    def work(group):
        choice = choices[group.rank]
        return exchange_of(group, experts_of_rank).dispatch(*tensors(group.rank, choice, dtype), choice)

    expected = slow_dispatch(choices, experts_of_rank)
    for sent, by_expert in zip(on_ranks(len(choices), work), expected):
        origins = [origin for rows in by_expert for origin in rows]
        assert sent.counts == [len(rows) for rows in by_expert]
        assert sent.rows.dtype == dtype
        assert torch.equal(sent.rows, torch.tensor([payload(s, t) for s, t, _ in origins], dtype=dtype).view(-1, HIDDEN))
        assert torch.equal(sent.weights, torch.tensor([weight_of(*o) for o in origins], dtype=sent.weights.dtype))


def test_combine_adds_up_what_the_experts_made_of_a_token(case):
    experts_of_rank, choices = case

    def work(group):
        exchange = exchange_of(group, experts_of_rank)
        sent = exchange.dispatch(*tensors(group.rank, choices[group.rank], torch.float64), choices[group.rank])
        factor = torch.tensor([e + 1.0 for e in experts_of_rank[group.rank]], dtype=torch.float64)
        factor_r = factor.repeat_interleave(torch.tensor(sent.counts, dtype=torch.int64))
        return exchange.combine(sent.rows * factor_r.unsqueeze(1), sent.handle)

    for rank, home in enumerate(on_ranks(len(choices), work)):
        total = [sum(e + 1 for e in chosen) for chosen in choices[rank].tolist()]
        expected = [[factor * value for value in payload(rank, token)] for token, factor in enumerate(total)]
        assert torch.equal(home, torch.tensor(expected, dtype=torch.float64).view(-1, HIDDEN))


def test_backwards_are_the_adjoints(case):
    """<A x, y> = <x, A' y>, summed over the ranks, for dispatch (rows and weights) and for combine."""
    experts_of_rank, choices = case

    def work(group):
        choice, make = choices[group.rank], torch.Generator().manual_seed(group.rank)
        exchange = exchange_of(group, experts_of_rank)

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

    rows, rows_t, weights, weights_t, combined, combined_t = np.sum(on_ranks(len(choices), work), axis=0)
    assert rows == pytest.approx(rows_t, abs=1e-9)
    assert weights == pytest.approx(weights_t, abs=1e-9)
    assert combined == pytest.approx(combined_t, abs=1e-9)


def test_a_wrong_number_of_experts_is_refused():
    with pytest.raises(ValueError, match="experts_per_rank = \\[3\\]"):
        ExpertExchange(None, torch.arange(4), [3])
