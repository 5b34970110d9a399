"""The bench that compares precisions: its arithmetic, what it calls missed, and a short run of all of it."""

from __future__ import annotations

import pytest

from jobs.benches.precision import bench as precision
from jobs.benches.precision.bench import BF16, FEW_BITS, FP8, Settings, errors, settled, smoothed, verdicts
from jobs.benches.precision.products import measure
from orchestrator.config.run_config import load, parse
from tests.cluster import REPOSITORY


def test_smoothing_is_the_reports():
    assert smoothed([1.0, 2.0, 2.0]) == pytest.approx([1.0, 1.1, 1.19])


def test_errors_count_from_the_end_of_warm_up():
    found = errors([9.0, 1.0, 1.1], [1.0, 1.0, 1.0], 1)
    assert found["largest_raw"] == pytest.approx(0.1) and found["mean_raw"] == pytest.approx(0.05) and found["steps"] == 2
    assert found["largest_smoothed"] == pytest.approx(7.2) and found["end"] == pytest.approx(0.9 * 8.2 + 0.11 - 1)


def test_a_loss_that_goes_on_falling_is_not_settled():
    assert settled([4.0, 2.0] + [1.0] * 100) < 0.4 and settled([1 / (1 + step) for step in range(100)]) > 0.75


def judged(smooth=0.001, sums=1e-3, **products):
    published = {"y": 0.01, "dx": 0.01, "dw": 0.01, "sums of y": 1e-7, "sums of dx": 1e-7, "sums of dw": 1e-7}
    coarse = published | {"sums of y": 1e-3, "sums of dx": 1e-3, "sums of dw": sums} | products
    return verdicts({FP8: {"largest_smoothed": smooth}}, {"published": published, FEW_BITS: coarse})


@pytest.mark.parametrize("changes, held", [
    ({"dw": 0.02}, [True, True, True]), ({}, [True, False, True]), ({"dw": 0.02, "smooth": 0.003}, [False, True, True]),
    ({"dw": 0.02, "sums": 5e-6}, [True, True, False])])
def test_bars(changes, held):
    assert list(judged(**changes).values()) == held


def test_coarser_ways_have_larger_errors():
    ways = {option: parse({}, [*precision.FLOAT8, option]).precision for option in precision.ABLATIONS.values()}
    found = measure(1024, 1024, ways)
    published = found.pop("published")
    assert all(1e-3 < published[key] < 0.1 and published[f"sums of {key}"] < 1e-6 for key in ("y", "dx", "dw"))
    assert found["precision.scales=tensor"]["dw"] > published["dw"]
    assert found["precision.accumulation=14bit"]["sums of dw"] > 1000 * published["sums of dw"]
    assert found["precision.gradients=e5m2"]["dx"] > 1.5 * published["dx"]


@pytest.mark.long
def test_a_short_run(corpus, tmp_path):
    config = load(f"{REPOSITORY}/jobs/configs/tiny.yaml", [
        f"data.path={corpus}", "data.sequence_length=32", "model.num_hidden_layers=2", "optimizer.warmup_steps=2"])
    settings = Settings(steps=6, sequences=4, ablations=False, tokens=256, inputs=256, picture=str(tmp_path / "losses.png"))
    found = precision.run(config, settings)
    losses = found["losses"]
    assert set(losses) == {BF16, FP8, "fp8 dispatch too", "fp32", precision.OTHER}
    assert all(len(of_run) == 6 and all(0 < loss < 8 for loss in of_run) for of_run in losses.values())
    assert losses[FP8] != losses[BF16] != losses["fp32"]
    assert all(0 < entry["largest_raw"] < 0.05 for entry in found["errors"].values()), found["errors"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
