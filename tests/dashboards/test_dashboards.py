"""What is generated is up to date, what Prometheus is given is valid, alerts fire when they should. Queries: tests/jobs/test_operate.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from actors.telemetry.exporter import RankMetrics, RunMetrics
from tests.cluster import REPOSITORY
from tests.dashboards.build import build

DASHBOARDS = REPOSITORY / "dashboards"
_NAME = re.compile(r"\bdualray_[a-z_]+")


def test_dashboards_are_what_their_source_makes():
    done = subprocess.run([sys.executable, "dashboards/build.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["overview", "details"])
def test_panels_fit_the_grid_and_do_not_overlap(name):
    panels = json.loads((DASHBOARDS / "grafana" / f"{name}.json").read_text())["panels"]
    taken = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert name == "details" or max(y for _, y in taken) < 24  # one screen: 24 rows of 30 pixels and their gaps


def test_alert_rules():
    done = subprocess.run(["promtool", "test", "rules", "alerts_test.yml"], cwd=DASHBOARDS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_to_be_silent():
    alerts = {rule["alert"] for group in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"] for rule in group["rules"]}
    cases = [case for test in yaml.safe_load((DASHBOARDS / "alerts_test.yml").read_text())["tests"] for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) == fires} == alerts


def test_prometheus_takes_its_configuration():
    done = subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=DASHBOARDS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_are_those_that_are_exported():
    exported = {sample.name for metrics in (RunMetrics(), RankMetrics()) for family in metrics.registry.collect()
                for sample in family.samples} | {
        "dualray_slow_factor", "dualray_model_flops_utilisation_ratio", "dualray_rank_accelerator_memory_bytes"}  # there at times
    used = {name for text in (*build.expressions(), (DASHBOARDS / "alerts.yml").read_text()) for name in _NAME.findall(text)}
    assert used <= exported, used - exported


def test_metrics_are_named_as_prometheus_wants(tmp_path):
    for metrics in (RunMetrics(), RankMetrics()):
        from prometheus_client import generate_latest

        done = subprocess.run(["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
