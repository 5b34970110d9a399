"""Benchmarks as commands, and the parity of layouts in a short form (the command runs all of it)."""

from __future__ import annotations

import json
import subprocess
import sys

from jobs.benches.parity import bench as parity
from orchestrator.config.run_config import load
from tests.cluster import REPOSITORY


def test_layouts_train_as_one_plain_process_does():
    """Pipeline, experts, both, stages in a V and in a loop, one hop and two; float64, against plain PyTorch with its own AdamW,
    clipping and bias update. With exchanges on a lane of their own, which some also do without: the same bits."""
    names = ["1x1x1", "PP2xEP2", "zbv PP2xEP2", "merged_interleaved_1f1b PP2xEP2", "zb_h1 PP3", "EP4, two hops"]
    found = parity.compare(load(f"{REPOSITORY}/jobs/configs/tiny.yaml"), names, ["float64"], steps=4)
    assert found["valid"], found["results"]
    results = found["results"]["float64"]
    assert all(result["flipped_choices_at_least"] == 0 for result in results.values())
    assert all(result["overlap"] and result["hops"] == 1 + ("two hops" in name) for name, result in results.items())
    assert {name for name in names if results[name].get("same_bits_in_turn")} == {*names} & {*parity.IN_TURN}
    assert found["same_bits_in_turn"] == "4 of 4" and results["EP4, two hops"]["overlap_ratio"] > 0


def test_a_difference_is_not_valid(monkeypatch):
    """The bench that compares must be able to fail: here no rounding is allowed."""
    monkeypatch.setattr(parity, "BARS", {"float64": {"loss": 0.0, "parameters": 0.0}})
    found = parity.compare(load(f"{REPOSITORY}/jobs/configs/tiny.yaml"), ["PP2"], ["float64"], steps=2)
    assert not found["valid"]


def test_other_bits_without_overlap_are_not_valid(monkeypatch):
    """Within all bars, but with another learning rate in the last bits."""
    train = parity._train

    def changed(*arguments):
        further = ["optimizer.learning_rate=0.003000000000001"] if "schedule.overlap=false" in arguments else []
        return train(*arguments, *further)

    monkeypatch.setattr(parity, "_train", changed)
    monkeypatch.setattr(parity, "IN_TURN", ("PP2",))
    found = parity.compare(load(f"{REPOSITORY}/jobs/configs/tiny.yaml"), ["PP2"], ["float64"], steps=2)
    assert not found["valid"] and found["same_bits_in_turn"] == "0 of 1"
    assert found["results"]["float64"]["PP2"]["parameters"] < parity.BARS["float64"]["parameters"]


def test_unknown_bench_is_one_line():
    done = subprocess.run([sys.executable, "-m", "jobs.bench", "nothing"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "parity" in done.stderr


def test_result_is_the_last_line_of_standard_output(capsys, monkeypatch):
    from jobs import bench

    monkeypatch.setattr(sys, "argv", ["jobs.bench", "parity", "--json"])
    monkeypatch.setattr(parity, "run", lambda config: {"settings": {}, "seconds": 1.0, "ratio": {}, "valid": False})
    assert bench.main() == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"bench", "settings", "seconds", "ratio"} <= found.keys() and found["bench"] == "parity"
