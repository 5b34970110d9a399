"""A run as it is operated: submitted to a cluster of raylets, watched by a real Prometheus and a real browser, a node lost, stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from actors.state import checkpoint
from tests.cluster import BIN, REPOSITORY, eventually
from tests.cluster import committed as steps_of
from tests.cluster.browser import Browser
from tests.cluster.monitoring import prometheus
from tests.dashboards.build import build
from tests.jobs.conftest import refused

NODES = {"layout__pipeline": 1, "layout__expert": "auto", "layout__data": "auto", "topology__virtual_nodes": 0,
         "topology__ranks_per_node": "auto", "elastic__silence_seconds": 5.0}
"""Silence: other tests run beside this one, and a node that is busy is not to be lost for it."""


def job(cluster, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess:
    environment = cluster.environment | {"RAY_ADDRESS": cluster.dashboard}
    return subprocess.run([str(BIN / "ray"), "job", *arguments], env=environment, capture_output=True, text=True, timeout=timeout)


def submit(cluster, command: list[str], *flags: str) -> subprocess.CompletedProcess:
    """Ray's job server refuses while the head's agent is still starting."""
    def accepted() -> subprocess.CompletedProcess | None:
        done = job(cluster, "submit", "--working-dir", str(REPOSITORY), *flags, "--", "python", *command)
        return None if "No available agent" in done.stderr else done
    return eventually(accepted, 60, "an agent that takes jobs")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_a_relative_run_folder_is_refused_under_ray_job(cluster, settings):
    relative = submit(cluster, [*settings("relative"), "--set", "run.directory=runs"])
    assert relative.returncode == 1
    assert "run.directory = runs: an absolute path or a URI under `ray job`" in relative.stdout + relative.stderr


@pytest.fixture
def raylets(cluster, ray_local):
    """Three that offer a rank each; the head offers none."""
    started = cluster.add_nodes({"rank": 1}, [""] * 3)
    yield started
    for process in started:
        cluster.remove_node(process)
    eventually(lambda: not ray_local.cluster_resources().get("rank"), 60, "the nodes are gone")


def test_submitted_watched_hit_and_stopped(cluster, settings, raylets, tmp_path):
    folder = settings.runs / "operated"
    command = settings("operated", **NODES, training__steps=100_000, training__batch_sequences=24, checkpoint__every=20)
    options = [f"telemetry.{option}" for option in ("timeline_seconds=0.5", "peak_teraflops=0.05", "tensorboard=true")]
    started = submit(cluster, [*command, *(word for option in options for word in ("--set", option))], "--no-wait",
                     "--submission-id", "operated")
    assert started.returncode == 0, started.stderr

    def committed() -> int:
        return len(steps_of(folder / "ledger.jsonl"))

    with prometheus(tmp_path, cluster.dashboard) as watching:
        try:
            eventually(lambda: committed() >= 3, 60, "three steps")
        except AssertionError as error:
            raise AssertionError(job(cluster, "logs", "operated").stdout[-3000:]) from error
        address = json.loads((folder / "live.json").read_text())["address"]
        _a_second_run_does_not_collide(cluster, settings, command, address)
        eventually(lambda: len(watching.targets("dualray")) == 4, 30, "the coordinator and three ranks are scraped")
        eventually(lambda: len(watching.targets("ray")) >= 4, 60, "Ray's own metrics of every node are scraped")
        for query in build.expressions():
            eventually(lambda query=query: watching.values(query.replace("$run", "operated")), 60, f"data for {query}")
        _the_page_shows_it(address, tmp_path)
        assert not watching.firing()

        _session_killed(raylets.pop())
        eventually(lambda: len(watching.targets("dualray")) == 3, 60, "the lost node is a target no more")
        eventually(lambda: "DualRayFewerNodes" in watching.firing(), 30, "the alert fires")
        before = committed()
        eventually(lambda: committed() >= before + 3, 60, "three more steps")
        status = cluster.run("-m", "jobs.status", "operated", "--set", f"run.directory={settings.runs}", "--json")
        live = json.loads(status.stdout)["live"]
        assert [len(row["ranks"]) for row in live["grid"]] == [1, 1] and len(live["lost"]) == 1 and 0 < live["goodput"] < 1
        assert live["newest"]["mfu"] > 0 and live["spent"]["recovery"] > 0

        raylets.append(cluster.add_node({"rank": 1}))
        eventually(lambda: "DualRayFewerNodes" not in watching.firing(), 60, "another node is taken in, the alert resolves")
        eventually(lambda: len(watching.targets("dualray")) == 4, 30, "its rank is a target too")

    assert job(cluster, "stop", "operated").returncode == 0
    assert "was stopped" in (status := job(cluster, "status", "operated")).stdout + status.stderr
    saved = checkpoint.complete(f"{folder}/checkpoints")[-1]
    assert checkpoint.read_manifest(saved).step == committed()
    eventually(lambda: not cluster.actors(), 20, "no actor is left")
    assert not (folder / "live.json").exists() and list((folder / "tensorboard").glob("events.out.tfevents.*"))
    told = job(cluster, "logs", "operated").stdout
    happened = [event["event"] for event in lines(folder / "events.jsonl")]
    assert [line.partition(":")[0].replace(" ", "_") for line in told.splitlines() if re.match(r"(generation|lost|joined)\b", line)] == [
        kind for kind in happened if kind in ("generation", "lost", "joined")], told
    assert "pid=" not in told and "Traceback" not in told, told  # nothing comes twice, through Ray and by itself


def _a_second_run_does_not_collide(cluster, settings, command: list[str], address: str) -> None:
    """One of the same name, or with the same port, is refused."""
    port = address.rpartition(":")[2]
    in_use, twice = cluster.run_all([*settings("other"), "--set", f"telemetry.port={port}"], command)
    refused(in_use, 1, f"telemetry.port = {port}", "0 takes any free port")
    refused(twice, 1, str(settings.runs / "operated"), "another run with this name is under way")
    done = submit(cluster, settings("beside"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "step 6/6" in done.stdout and len(lines(settings.runs / "beside" / "metrics.jsonl")) == 6
    other = re.search(r"targets http://([0-9.:]+)/", done.stdout)[1]
    assert int(other.rpartition(":")[2]) == int(port) + 1


def _the_page_shows_it(address: str, folder: Path) -> None:
    with Browser() as browser:
        for width in (1280, 390):
            browser.open(f"http://{address}/", width)
            browser.until("document.getElementById('state').textContent === 'training'")
            assert browser.until("document.querySelectorAll('.node .rank').length") == 3
            assert browser.until("document.querySelectorAll('#timeline rect').length") > 20
            assert browser.value("document.documentElement.scrollWidth") <= width
            browser.screenshot(folder / f"page-{width}.png")
        assert not browser.problems


def _session_killed(process: subprocess.Popen) -> None:
    """A host that dies: all of its processes at once."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=20)
