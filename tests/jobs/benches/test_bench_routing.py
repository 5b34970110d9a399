"""The routing bench in small: two nodes of two ranks. And what it measures against, each by another way."""

from __future__ import annotations

import itertools

import pytest

from jobs.benches.routing import bench as routing
from jobs.benches.routing import gate as routing_gate
from jobs.benches.routing import rank as routing_rank
from jobs.benches.routing.bench import Case, Settings
from jobs.benches.routing.expected import limited, published_packing, unlimited
from jobs.benches.routing.rank import RoutingReport
from orchestrator.config.run_config import RunConfig


def settings(**changes) -> Settings:
    small = {"nodes": 2, "ranks_per_node": 2, "tokens": 200, "hidden": 16, "limits": [8, 2], "monte_carlo": 2000,
             "gate_tokens": 64, "gate_hidden": [32], "repeats": 2, "moves": 2, "intermediate": 8}
    return Settings(**(small | changes))


@pytest.fixture(scope="module")
def found():
    return routing.run(RunConfig(), settings())


def test_bytes_are_near_the_expected(found):
    """800 tokens: the bars of the full bench are 2 %; here noise is larger."""
    assert found["across"].keys() == {"limit 8, 1 hop", "limit 8, 2 hops", "limit 2, 1 hop", "limit 2, 2 hops"}
    for of_case in found["across"].values():
        assert all(0.9 < ratio < 1.1 for ratio in of_case["measured/expected"]) and of_case["right"]
        assert of_case["token_and_node_pairs"] <= of_case["rows"]


def test_the_second_hop_saves_what_the_first_repeated(found):
    for limit in (8, 2):
        once, twice = (found["across"][f"limit {limit}, {hops}"] for hops in ("1 hop", "2 hops"))
        assert twice["rows"] == twice["token_and_node_pairs"] == once["token_and_node_pairs"] < once["rows"]


def test_gates_are_timed_as_often_and_choose_alike(found):
    (gate,) = found["gate"]
    seconds = found["seconds"]["gate and permutation, hidden 32"]
    assert gate["same"] and {name: len(taken) for name, taken in seconds.items()} == {"ours": 2, "transformers": 2}


def test_re_placement_is_measured_on_the_ranks(found):
    load = found["load"]["max/mean"]
    assert 1 <= load["after"] <= load["published packing"] <= load["before"] < load["experts"]


def test_experts_move_to_where_the_load_wants_them(found):
    """16 x 8 values in each of three matrices, their moments, on two owners; the state of experts that stay stays."""
    moved, of_expert = found["move"], 3 * 3 * 16 * 8 * 4
    assert moved["right"] and 0 < moved["experts"] <= 256
    assert 0 < moved["bytes"] <= 2 * moved["experts"] * of_expert and moved["moved/needed"] >= 1
    assert {name: len(taken) for name, taken in found["seconds"]["move"].items()} == {"move": 4, "stream": 4}
    assert found["ratio"]["move/stream"] == moved["move/stream"] > 0
    fastest = moved["bytes_per_second"]
    assert fastest["move"] * moved["move/stream"] == pytest.approx(fastest["stream"])


@pytest.mark.parametrize("nodes, distinct", [(2, 1.993), (4, 3.614), (8, 5.295), (16, 6.523), (32, 7.267)])
def test_closed_form(nodes, distinct):
    """Distinct nodes of a uniform choice of 8 of 256, as computed elsewhere; all but its own node are remote."""
    assert unlimited(256, 8, nodes, 2 * nodes).nodes == pytest.approx(distinct * (nodes - 1) / nodes, abs=1e-3)


def test_closed_form_is_the_mean_of_all_choices():
    reach = unlimited(8, 3, 2, 4)
    chosen = list(itertools.combinations(range(8), 3))
    assert reach.nodes == pytest.approx(sum(any(e // 4 == 1 for e in c) for c in chosen) / len(chosen))
    assert reach.ranks == pytest.approx(sum(len({e // 2 for e in c} & {2, 3}) for c in chosen) / len(chosen))


def test_monte_carlo_without_a_limit_is_the_closed_form():
    exact, drawn = unlimited(256, 8, 8, 16), limited(256, 8, 8, 8, 8, 16, tokens=4000)
    assert drawn.nodes == pytest.approx(exact.nodes, rel=0.01) and drawn.ranks == pytest.approx(exact.ranks, rel=0.01)
    assert limited(256, 8, 4, 8, 8, 16, tokens=4000).nodes == pytest.approx(3.964 * 7 / 8, rel=0.01)


def test_published_packing():
    """Its README's loads with one replica each: 4 groups of 3 on 2 nodes of 2 ranks, by hand.

    Groups weigh 262, 330, 116, 325: the two heaviest are apart, 262 joins the lighter, 116 takes the room that is left. Then the
    heaviest first: 165 | 104 73, 61 to the lighter, 39 to the other's 177, and 4 to what has room; 183 | 132 90, 86, 56, 40.
    """
    load = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    first = {165 + 61 + 4, 104 + 73 + 39}
    second = {183 + 86 + 40, 132 + 90 + 56}
    assert published_packing(load, 4, 2, 2) == max(first | second) * 4 / sum(load)


def case_of(across, combined, pairs, right=True):
    """A rank's report of 10 tokens with a row of 64 bytes and headers of 64 slots."""
    return RoutingReport(routing_rank.Sent(across, 5), routing_rank.Sent(combined, 7), pairs, 30, [10] * 8, right)


def test_verdicts():
    small, expected = settings(tokens=10), unlimited(256, 8, 2, 4)
    rows = round(expected.nodes * 10)  # 10 of 10 tokens, within half a percent

    def checks(gate=0.9, even=1.0, same=True, whole=True, **changes):
        values = {"across": rows * (64 + 128 * 4), "combined": rows * 64, "pairs": rows} | changes
        across = {"limit 8, 2 hops": routing.crossing(small, Case(8, 2), [case_of(**values)])}
        gates = [{"hidden": 32, "same": same, "ours/transformers": gate}]
        return [name for name, holds in routing.verdicts(
            across, gates, {"ours/published": even}, {"right": whole}).items() if not holds]

    assert checks() == []
    assert checks(gate=1.01) == checks(same=False) == ["hidden 32: gate and permutation no dearer than transformers' gate and index_select"]
    assert checks(even=1.01) == ["re-placement at least as even as the published packing"]
    assert checks(whole=False) == ["moved experts arrived whole"]
    assert checks(pairs=rows - 1) == ["limit 8, 2 hops: a token crosses to a node once"]
    assert checks(right=False) == ["limit 8, 2 hops: every token came home"]
    assert checks(across=1.03 * rows * (64 + 128 * 4)) == ["limit 8, 2 hops: bytes within 2% of the expected"]


def test_an_other_gate_is_seen(monkeypatch):
    monkeypatch.setattr(routing_gate, "choose_experts", lambda a, bias, model: a.topk(model.num_experts_per_tok)[1])
    model = routing._model(settings(), 2, 32)
    assert not routing_gate.measure(model, 64, 1)["same"]


@pytest.mark.parametrize("option, line", [
    ("nodes=3", "nodes = 3: "), ("limits=[9]", "limits = 9: 1 to 8 expert groups"), ("hops=2", "hops = 2: ")])
def test_options_are_refused_in_one_line(bench, option, line):
    code, out, err = bench("routing", "--option", option)
    assert code == 2 and err.startswith(line) and err.count("\n") == 1 and not out
