"""Every kind of schedule trains: the losses and weights of one plain process, whatever comes when."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from random_schedule import draw_schedules
from runtime import batch_of, configured, digest_by_hand, state, train

from actors.data.batching import Dealer
from actors.state.checkpoint import MASTER
from jobs.benches.shared import plain
from orchestrator.plan import scheduling
from orchestrator.schedule.ir.actions import SplitAction
from orchestrator.schedule.kinds.registry import KINDS

STEPS = 3


def steps_of(sequences):
    """Microbatches of up to 3 sequences. No layout divides these batches evenly."""
    return f"training.batch_sequences={sequences}", "training.microbatch_sequences=3", f"training.steps={STEPS}"


UNEVEN = steps_of(25)


@cache
def reference(*overrides):
    """Losses by step and final weights of the plain process; the schedule plays no part in it."""
    config, _ = configured("one rank", *overrides)
    return plain.reference(config, [batch_of(config, step) for step in range(STEPS)])


def digests(folder):
    lines = map(json.loads, (folder / "run" / "ledger.jsonl").read_text().splitlines())
    return [line["digest"] for line in lines if "kind" not in line]


def assert_as_plain(run, ranks, layout, *overrides):
    assert run.error is None, run.error
    expected = reference(*overrides)
    assert [step["loss"] for step in run.steps] == pytest.approx(expected["losses"], rel=1e-10)
    for (name, kind), values in state(ranks, layout).items():
        if kind == MASTER:
            theirs = torch.from_numpy(expected["parameters"][name]).flatten()
            assert float((values - theirs).abs().max() / theirs.abs().max()) < 1e-10, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_as_one_plain_process_does(ranks, tmp_path, kind):
    """Two ranks share experts, and where one has a microbatch of one sequence the other's is empty."""
    config, layout = configured("PP2xEP2", f"schedule.kind={kind}", *UNEVEN)
    run = train(ranks, tmp_path, config, layout)
    assert_as_plain(run, ranks, layout, *UNEVEN)
    assert digests(tmp_path) == [digest_by_hand(batch_of(config, step)) for step in range(STEPS)]


@pytest.mark.parametrize("name, further", [
    ("PP2", ["schedule.kind=zbv"]), ("PP2xDP2", ["schedule.kind=dualpipev"]),
    pytest.param("one rank", ["schedule.kind=zbv"], marks=pytest.mark.long),
    ("one rank", ["schedule.kind=interleaved_1f1b", "schedule.chunks=4"]), ("EP4", ["schedule.kind=merged_interleaved_1f1b"]),
    ("PP4", ["schedule.kind=zb_h1", "model.num_nextn_predict_layers=0"])])
def test_other_layouts(ranks, tmp_path, name, further):
    mtp = [setting for setting in further if setting.startswith("model.")]
    config, layout = configured(name, *UNEVEN, *further)
    run = train(ranks, tmp_path, config, layout)
    assert_as_plain(run, ranks, layout, *UNEVEN, *mtp)


FOLDINGS = {"both": [], "v": [], "loop": ["schedule.chunks=2"]}


@pytest.mark.parametrize("placement", FOLDINGS)
def test_what_a_search_finds_trains_as_one_plain_process_does(ranks, tmp_path, placement):
    chosen = f"schedule.placement={placement}", *FOLDINGS[placement]
    config, layout = configured("PP2xEP2", "schedule.kind=searched", *chosen, *UNEVEN)
    run = train(ranks, tmp_path, config, layout)
    assert_as_plain(run, ranks, layout, *UNEVEN)
    microbatches = Dealer(config, layout).requests(batch_of(config, 0), None, training=True)[0].microbatches
    found = scheduling.schedule_of(config, layout.folding, microbatches, training=True)
    assert any(isinstance(action, SplitAction) for row in found.rows for action in row)  # so the run had some


@pytest.mark.parametrize("name, sequences, placement", [
    ("PP2xEP2", 61, "both"), ("PP2xEP2", 65, "v"), ("PP2xEP2", 61, "loop"),
    *(pytest.param("PP2", 33, placement, marks=pytest.mark.long) for placement in ("both", "loop"))])
def test_pairs_of_all_kinds_and_halves_train_as_one_plain_process_does(ranks, tmp_path, monkeypatch, name, sequences, placement):
    """Drawn schedules of 12 microbatches. With EP2, `both`: of 61 sequences one rank's last microbatch has 1 and the other's
    none, of 65 it is 2 and 1; so a half of one rank meets an empty half of the other."""
    config, layout = configured(name, "schedule.kind=searched", f"schedule.placement={placement}", *FOLDINGS[placement],
                                *steps_of(sequences))
    used = draw_schedules(monkeypatch)
    run = train(ranks, tmp_path, config, layout)
    assert_as_plain(run, ranks, layout, *steps_of(sequences))
    assert len(used) == 1
    monkeypatch.undo()
    whole = train(ranks, tmp_path / "whole", *configured("one rank", *steps_of(sequences)))  # the other losses are the same too
    assert torch.tensor(run.losses) == pytest.approx(torch.tensor(whole.losses), rel=1e-10)
    assert digests(tmp_path) == [digest_by_hand(batch_of(config, step)) for step in range(STEPS)]


def test_kinds_that_add_gradients_in_one_order_give_the_same_bits(ranks, tmp_path):
    """Same stages, same microbatches, and each weight's gradients added microbatch by microbatch: then nothing is rounded
    otherwise, be W deferred or not, and be actions paired or not."""
    for group in (["1f1b", "gpipe", "zb_h1"], ["interleaved_1f1b", "merged_interleaved_1f1b"]):
        runs = [train(ranks, tmp_path / kind, *configured("PP2xEP2", f"schedule.kind={kind}", *UNEVEN)) for kind in group]
        assert all(run.error is None and run.losses == runs[0].losses for run in runs), group
