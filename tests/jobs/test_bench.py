"""Benchmarks as commands, and the parity of layouts in a short form (the command runs all of it)."""

from __future__ import annotations

import json
import subprocess
import sys

from jobs.benches import parity
from orchestrator.config import load
from tests.cluster import REPOSITORY


def test_layouts_train_as_one_plain_process_does():
    """Pipeline, experts, both, and stages in a V and in a loop; float64, against plain PyTorch with its own AdamW, clipping
    and bias update."""
    names = ["1x1x1", "PP4", "EP2", "DP2", "PP2xEP2", "zbv PP2xEP2", "merged_interleaved_1f1b PP2xEP2", "zb_h1 PP3"]
    found = parity.compare(load(f"{REPOSITORY}/jobs/configs/tiny.yaml"), names, ["float64"], steps=4)
    assert found["valid"], found["results"]
    assert all(result["flipped_choices_at_least"] == 0 for result in found["results"]["float64"].values())


def test_a_difference_is_not_valid(monkeypatch):
    """The bench that compares must be able to fail: here no rounding is allowed."""
    monkeypatch.setattr(parity, "BARS", {"float64": {"loss": 0.0, "parameters": 0.0}})
    found = parity.compare(load(f"{REPOSITORY}/jobs/configs/tiny.yaml"), ["PP2"], ["float64"], steps=2)
    assert not found["valid"]


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
