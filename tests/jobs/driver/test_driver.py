"""A run whose driver dies, on real raylets: who takes it over, who ends it, and that nothing is left behind. Needs root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from actors.state import checkpoint
from jobs.benches.chaos.raylet_commands import command_line, command_of, lines, tokens
from jobs.benches.shared.raylets import RayletCluster
from tests.cluster import committed, eventually

SECONDS = 120.0
"""Bound on what a busy machine takes to start processes and to go on."""
COMPARED = 12
SETTINGS = {"layout": {"pipeline": 2, "expert": 1, "data": 1}, "checkpoint": {"every": 0},
            "elastic": {"copies": 1, "cool_down_seconds": 0.5, "silence_seconds": 10.0}}
GONE = (b"ray::StageActor", b"ray::Coordinator")


@pytest.fixture(scope="module")
def cluster():
    with RayletCluster(2, 1, environment={"RAY_memory_monitor_refresh_ms": "0"}) as found:
        yield found


@pytest.fixture(scope="module")
def data(cluster, tmp_path_factory):
    return tokens(cluster, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def undisturbed(cluster, data, tmp_path_factory):
    return losses_alone(cluster, tmp_path_factory.mktemp("alone"), data)


def losses_alone(cluster, folder: Path, data: str) -> list[float]:
    """Of the first steps of a run that nothing befell."""
    run = Driven(cluster, folder, data, "alone", training={"steps": COMPARED})
    assert run.process.wait(SECONDS) == 0, run.said()
    return run.losses


class Driven:
    """A run of this file's configuration, and the process that drives it at the moment, on a node."""

    def __init__(self, cluster, folder: Path, data: str, name: str, node: int = 0, **sections):
        sections = {key: value | sections.get(key, {}) for key, value in SETTINGS.items()} | {
            key: value for key, value in sections.items() if key not in SETTINGS}
        self.cluster, self.folder, self.path, self._starts = cluster, folder, folder / "runs" / name, 0
        self.command = command_of(folder, data, name, **sections)
        self.start(node)

    def start(self, node: int = 0) -> subprocess.Popen:
        """The same command, again."""
        self._starts += 1
        self._out, self._err = (self.folder / f"driver{self._starts}.{kind}" for kind in ("out", "err"))
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = self.cluster.start("-m", *self.command, node=node, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        return self.process

    def job(self, name: str, *arguments: str, node: int = 0, seconds: float = SECONDS) -> subprocess.CompletedProcess:
        process = self.cluster.start("-m", f"jobs.{name}", *arguments, node=node, stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def said(self) -> str:
        return self._out.read_text()

    def complained(self) -> list[str]:
        return [line for line in self._err.read_text().splitlines() if line.strip()]

    @property
    def steps(self) -> int:
        return len(committed(self.path / "ledger.jsonl"))

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in lines(self.path / "metrics.jsonl")]

    @property
    def origins(self) -> list[str | None]:
        """Where state was loaded from."""
        return [found["source"] for line in (self.path / "ledger.jsonl").read_text().splitlines()
                if (found := json.loads(line)).get("kind") == "origin"]

    def actors(self, kind: bytes | tuple[bytes, ...] = GONE) -> list[int]:
        """Processes of ranks and coordinators, wherever they are."""
        return sorted(pid for node in range(len(self.cluster.addresses)) for pid in self.cluster.pids(node)
                      if command_line(pid).startswith(kind))

    @property
    def ranks(self) -> list[int]:
        return self.actors(b"ray::StageActor")

    def until_steps(self, more: int, driven: bool = True) -> None:
        before = self.steps

        def there() -> bool:
            assert not driven or self.process.poll() is None, self.said() + self._err.read_text()
            return self.steps >= before + more
        eventually(there, SECONDS, f"{more} more steps: {self.said()[-2000:]}")

    def until_said(self, words: str) -> None:
        def there() -> bool:
            assert self.process.poll() is None or words in self.said(), self.said() + self._err.read_text()
            return words in self.said()
        eventually(there, SECONDS, words)

    def until_nothing_is_left(self, seconds: float = SECONDS) -> None:
        eventually(lambda: not self.actors(), seconds, "no rank and no coordinator is left")

    def kill_driver(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill_driver()
        for pid in self.actors():
            os.kill(pid, signal.SIGKILL)
        self.until_nothing_is_left()


@pytest.fixture
def driven(cluster, tmp_path, data):
    made = []

    def make(name: str, **options) -> Driven:
        made.append(Driven(cluster, tmp_path, data, name, **options))
        return made[-1]
    yield make
    for run in made:
        run.close()


def test_a_driver_that_was_killed_is_replaced_by_the_same_command(driven, undisturbed):
    run = driven("replaced")
    run.until_steps(3)
    before, coordinator = run.ranks, run.actors(b"ray::Coordinator")
    run.kill_driver()
    run.until_steps(3, driven=False)  # it goes on by itself
    refused = run.job("train", *run.command[1:], "--set", "optimizer.learning_rate=0.5")
    assert refused.returncode == 2, refused.stderr
    assert "optimizer.learning_rate = 0.5: 0.001, as in the run under way" in refused.stderr
    run.start()
    run.until_said("took over the run: its driver was lost")
    run.until_steps(3)
    assert run.ranks == before and run.actors(b"ray::Coordinator") == coordinator
    second = run.job("train", *run.command[1:])
    assert second.returncode == 1 and "another run with this name is under way" in second.stderr, second.stderr
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(SECONDS) == 130, run.said()
    run.until_nothing_is_left(20)
    assert run.origins == [None] and not (run.path / "live.json").exists()
    assert run.losses[:COMPARED] == undisturbed and len(run.losses) == run.steps


def test_driver_and_coordinator_killed_the_ranks_that_live_are_taken_over_and_jobs_stop_ends_it(driven, undisturbed):
    run = driven("both")
    run.until_steps(3)
    before = run.ranks
    run.kill_driver()
    for pid in run.actors(b"ray::Coordinator"):
        os.kill(pid, signal.SIGKILL)
    committed_then = run.steps
    run.start()
    run.until_said("took over 2 ranks: driver and coordinator were lost")
    run.until_steps(3)
    assert run.ranks == before and run.steps >= committed_then + 3 and run.origins == [None]
    done = run.job("stop", str(run.path))
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout == f"stopped: saved after step {run.steps}\n" and not done.stderr
    assert run.process.wait(SECONDS) == 130, run.said()
    run.until_nothing_is_left(20)
    assert checkpoint.read_manifest(checkpoint.complete(f"{run.path}/checkpoints")[-1]).step == run.steps
    assert run.losses[:COMPARED] == undisturbed[: len(run.losses)]
    again = run.job("stop", str(run.path))
    assert again.returncode == 1 and "no run is under way" in again.stderr, again.stderr


def test_without_a_driver_a_run_is_saved_and_ends_by_itself(driven):
    run = driven("orphan", elastic={"orphan_seconds": 5.0})
    run.until_steps(2)
    before = time.monotonic()
    run.kill_driver()
    run.until_nothing_is_left()
    assert time.monotonic() - before > 4.0
    assert checkpoint.read_manifest(checkpoint.complete(f"{run.path}/checkpoints")[-1]).step == run.steps
    assert not (run.path / "live.json").exists()


def test_without_driver_and_coordinator_ranks_end_by_themselves(driven):
    run = driven("ranks", elastic={"orphan_seconds": 5.0})
    run.until_steps(2)
    run.kill_driver()
    for pid in run.actors(b"ray::Coordinator"):
        os.kill(pid, signal.SIGKILL)
    run.until_nothing_is_left()


def test_a_driver_that_is_killed_while_it_stops_leaves_a_saved_run(driven):
    run = driven("stopping", elastic={"orphan_seconds": 5.0})
    run.until_steps(2)
    run.process.send_signal(signal.SIGINT)
    run.until_said("stopping: saving")
    run.kill_driver()
    run.until_nothing_is_left()
    assert checkpoint.read_manifest(checkpoint.complete(f"{run.path}/checkpoints")[-1]).step == run.steps


def test_stopped_at_once_from_another_host_while_nobody_drives_it(driven):
    run = driven("now")
    run.until_steps(2)
    run.kill_driver()
    done = run.job("stop", "now", "--now", "--set", f"run.directory={run.path.parent}", node=1)
    assert done.returncode == 0 and "stopped: saved after step 0; " in done.stdout, (done.stdout, done.stderr)
    run.until_nothing_is_left(20)
    assert checkpoint.complete(f"{run.path}/checkpoints") == []


def test_a_rank_that_is_lost_while_nobody_drives_the_run_is_replaced(driven):
    run = driven("alone-and-hit")
    run.until_steps(2)
    run.kill_driver()
    victim = run.ranks[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: victim not in run.ranks and len(run.ranks) == 2, SECONDS, "another rank")
    run.until_steps(3, driven=False)
    run.start()
    run.until_said("took over the run")
    assert len(run.ranks) == 2
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(SECONDS) == 130, run.said()


def told_in_one_line(run: Driven, words: str, seconds: float) -> None:
    assert run.process.wait(seconds) == 1, run.said()
    assert len(run.complained()) == 1 and words in run.complained()[0], run.complained()


def only(cluster, node: int, words: bytes) -> int:
    found, = [pid for pid in cluster.pids(node) if words in command_line(pid)]
    return found


def test_the_death_of_the_drivers_raylet_is_told_in_one_line_and_leaves_nothing_behind(driven, cluster):
    """The head's, to which Ray connects every driver of this machine. The coordinator is beside it."""
    run = driven("raylet", elastic={"orphan_seconds": 5.0})
    run.until_steps(2)
    os.kill(only(cluster, 0, b"start\0--block"), signal.SIGSTOP)  # it would end the control store, too
    os.kill(only(cluster, 0, b"/raylet/raylet\0"), signal.SIGKILL)
    told_in_one_line(run, "this host's raylet has ended", 20)
    run.until_nothing_is_left()


def test_the_death_of_rays_control_store_is_told_in_one_line_and_leaves_nothing_behind(driven, cluster):
    """The last one: there is no cluster any more afterwards. The driver is connected to the raylet of another node."""
    run = driven("store", elastic={"orphan_seconds": 5.0})
    run.until_steps(2)
    os.kill(only(cluster, 0, b"/gcs/gcs_server\0"), signal.SIGKILL)
    told_in_one_line(run, "Ray's control store has not answered", 30)
    run.until_nothing_is_left()
    assert checkpoint.read_manifest(checkpoint.complete(f"{run.path}/checkpoints")[-1]).step == run.steps
