"""Two hops between rank processes: EP groups of two rows with two ranks each train as with one hop, and as one rank does."""

from __future__ import annotations

import pytest
from runtime import configured, furthest, on_all, state, train

from actors.comm.traffic import Sent

STEPS = 3
UNEVEN = ("training.batch_sequences=11", "training.microbatch_sequences=2", f"training.steps={STEPS}",  # empty microbatches
          "model.num_experts_per_tok=4")


def trained(ranks, folder, name, *overrides):
    config, layout = configured(name, *UNEVEN, *overrides)
    run = train(ranks, folder, config, layout)
    assert run.error is None, run.error
    return run, state(ranks, layout), layout


@pytest.fixture(scope="module")
def one_hop(ranks, tmp_path_factory):
    return trained(ranks, tmp_path_factory.mktemp("one"), "two hops", "layout.hops=1")[:2]


def test_two_hops_train_as_one_does(ranks, tmp_path, one_hop):
    run, found, layout = trained(ranks, tmp_path, "two hops")
    assert (layout.rows, layout.width) == (2, 2) and set(on_all(ranks, hops, layout.size)) == {2}
    expected, their_state = one_hop
    for ours, theirs in zip(run.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert furthest(found, their_state) < 1e-12


def test_one_hop_trains_as_one_rank_does(ranks, tmp_path, one_hop):
    run, found, _ = trained(ranks, tmp_path, "one rank")
    expected, their_state = one_hop
    for ours, theirs in zip(run.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    assert furthest(found, their_state) < 1e-10


def test_a_step_reports_what_it_sent(ranks, tmp_path):
    """Each forward and backward of a layer crosses with the same rows; the second hop stays inside, and one hop crosses more."""
    sent = {}
    for hops_wanted in (1, 2):
        _, _, layout = trained(ranks, tmp_path / str(hops_wanted), "two hops", f"layout.hops={hops_wanted}")
        sent[hops_wanted] = sum((Sent(*pair) for pair in on_all(ranks, traffic, layout.size)), Sent())
    assert 0 < sent[2].across < sent[1].across and sent[2].inside > sent[1].inside > 0


def test_float8_trains_alike_on_every_layout(ranks, tmp_path):
    """What experts see is rounded alike wherever they are, so only the order of sums differs, and what it flips of roundings."""
    wide = ("model.hidden_size=128", "training.dispatch_precision=float8")
    run, _, _ = trained(ranks, tmp_path / "grid", "two hops", *wide)
    alone, _, _ = trained(ranks, tmp_path / "alone", "one rank", *wide)
    same, _, _ = trained(ranks, tmp_path / "same", "one rank", wide[0])
    for ours, theirs, exact in zip(run.losses, alone.losses, same.losses, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[0] != exact[0]
    assert run.losses[0][0] == pytest.approx(same.losses[0][0], rel=1e-3)  # later their weights differ


def hops(host):
    exchanges = {layer._exchange for chunk in host._chunks.values() for layer in chunk._layers.values()
                 if hasattr(layer, "_exchange")}
    return max(len(exchange._hops) for exchange in exchanges)


def traffic(host):
    return host._traffic.sent.across, host._traffic.sent.inside
