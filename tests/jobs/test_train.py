"""Whole runs by the command that users type, on a real Ray cluster; and a driver whose storage fails, without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from actors.files import storage
from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from actors.state import checkpoint
from jobs import cli, train
from jobs.driver import live, running, session
from orchestrator.config.run_config import ConfigError, parse
from tests.cluster import committed, eventually, free_port
from tests.jobs.conftest import LARGE, refused
from tests.jobs.driving import DONE, STEP, Driver, Shown, Signals, coordinator


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl")}


def parameters(folder: Path) -> dict[str, bytes]:
    newest = checkpoint.complete(f"{folder}/checkpoints")[-1]
    return {name: value.tobytes() for name, value in checkpoint.read_parameters(newest).items()}


def test_a_run_leaves_what_the_contract_says(cluster, settings):
    done = cluster.run(*settings(), "--set", "telemetry.trace_steps=[4]")
    assert done.returncode == 0, done.stderr
    folder = settings.runs / "run"
    metrics, events = (lines(folder / f"{name}.jsonl") for name in ("metrics", "events"))
    ledger = committed(folder / "ledger.jsonl")
    assert [line["step"] for line in metrics] == [line["step"] for line in ledger] == list(range(6))
    for key in ("loss", "tokens", "tokens_per_second", "overlap_ratio", "bubble_ratio", "exposed_comm_seconds", "generation", "nodes"):
        assert all(isinstance(line[key], int | float) for line in metrics), key
    assert [line["first"] for line in ledger] == [8 * step for step in range(6)]
    assert all(re.fullmatch("[0-9a-f]{32}", line["digest"]) for line in ledger)
    assert "layout" in ledger[0] and all("layout" not in line for line in ledger[1:])
    assert [event["step"] for event in events if event["event"] == "validation"] == [3, 6]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 4, 6]
    assert [Path(name).name for name in checkpoint.complete(f"{folder}/checkpoints")] == ["step-00000004", "step-00000006"]
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["step"] for event in trace if event["ph"] == "X"} == {4}
    assert {event["pid"] for event in trace} == {0, 1}
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["hidden_size"] == 32
    for words in ("validation", "unigram", "bigram", "trigram", "tokens/s", "step 6/6"):
        assert words in done.stdout, done.stdout
    eventually(lambda: not cluster.actors(), 20, "no actor is left")


def test_twice_the_same_run_is_the_same_bit_for_bit_and_resumes_bit_for_bit(cluster, settings, undisturbed):
    """The second run is stopped by SIGTERM on its way and continued by the same command."""
    command = settings("cut", **LARGE)
    first = cluster.start(*command)
    metrics = settings.runs / "cut" / "metrics.jsonl"
    eventually(lambda: first.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) >= 3), 90, "three steps")
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, (out, err)
    stopped_at = len(losses(settings.runs / "cut"))
    assert 3 <= stopped_at < 14
    eventually(lambda: not cluster.actors(), 20, "no actor is left")
    second = cluster.run(*command)
    assert second.returncode == 0, second.stderr
    assert f"resumed: step {stopped_at}" in second.stdout
    assert losses(settings.runs / "cut") == losses(undisturbed)
    assert parameters(settings.runs / "cut") == parameters(undisturbed)


def test_a_run_is_done_though_nobody_reads_what_it_says(cluster, settings):
    process = cluster.start(*settings("unread"))
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(timeout=20) == 0 and told.startswith("nothing more is shown: ") and "Traceback" not in told, told
    assert len(committed(settings.runs / "unread" / "ledger.jsonl")) == 6


def killed_in_a_checkpoint(cluster, command: list[str], folder: Path) -> bool:
    """SIGKILL the driver and every actor while a second checkpoint is being written; whether that came before its manifest."""
    def names() -> set[str]:
        return {path.name for path in folder.iterdir() if any(path.iterdir())} if folder.exists() else set()

    def complete() -> set[str]:
        return {Path(path).name for path in checkpoint.complete(str(folder))}

    process = cluster.start(*command)
    eventually(lambda: process.poll() is not None or (complete() and names() - complete()), 90, "a second checkpoint begins")
    for actor in cluster.actors():
        os.kill(actor, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return bool(complete() and names() - complete())


def test_killed_in_the_middle_of_a_checkpoint_it_continues_from_the_last_good_one(cluster, settings, undisturbed):
    for name in ("killed", "killed-again", "killed-once-more"):  # a busy machine may kill too late to be in the middle
        command, folder = settings(name, **LARGE), settings.runs / name
        if killed_in_a_checkpoint(cluster, command, folder / "checkpoints"):
            break
    else:
        pytest.fail("every kill came too late to be in the middle of a checkpoint")
    eventually(lambda: not cluster.actors(), 20, "no actor is left")
    good = checkpoint.read_manifest(checkpoint.complete(f"{folder}/checkpoints")[-1]).step
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    assert f"resumed: step {good}" in done.stdout
    assert losses(folder) == losses(undisturbed)
    assert parameters(folder) == parameters(undisturbed)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == [Path(path).name for path in checkpoint.complete(f"{folder}/checkpoints")] and len(left) == 2


def test_dry_run_starts_no_actor(cluster, settings):
    done = cluster.run(*settings(), "--dry-run", timeout=30)
    assert done.returncode == 0, done.stderr
    assert "layout       PP2 x EP1 x DP1" in done.stdout and "microbatches" in done.stdout and "memory" in done.stdout
    assert not (settings.runs).exists()


@pytest.mark.parametrize("change, words", [
    ("layout.pipeline=3", ("layout.pipeline = 3", "even")),
    ("schedule.kind=zbv", ("layout.pipeline = 2", "at most 1", "zbv has 2 stages on each position")),
    ("layout.data=4", ("layout.data = 4", "ranks", "cluster has 2")),
    ("model.topk_group=5", ("model.topk_group = 5", "model.n_group = 4")),
    ("training.stepz=5", ("training.stepz = 5", "unknown key")),
    ("training.steps=many", ("training.steps = many", "integer")),
    ("model.n_group=3", ("model.n_group = 3", "divisor")),
])
def test_refused_before_anything_starts(cluster, settings, change, words):
    refused(cluster.run(*settings(), "--set", change, "--dry-run", timeout=30), 2, *words)


def test_data_that_cannot_be_used_is_refused_before_actors_start(cluster, settings, corpus, tmp_path):
    damaged, missing = tmp_path / "damaged", tmp_path / "missing"
    for folder in (damaged, missing):
        subprocess.run(["cp", "-r", corpus, str(folder)], check=True)
    shard = sorted((damaged / "train").glob("*.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    (missing / "train" / shard.name).unlink()
    found = cluster.run_all([*settings("nowhere"), "--set", f"data.path={tmp_path}/nowhere"],
                            [*settings("long"), "--set", "data.sequence_length=64"],
                            [*settings("damaged"), "--set", f"data.path={damaged}"],
                            [*settings("missing"), "--set", f"data.path={missing}"])
    expected = [(2, f"data.path = {tmp_path}/nowhere", "jobs.tokenize"), (2, "data.sequence_length = 64", "32"),
                (1, shard.name), (1, shard.name)]
    for done, (code, *words) in zip(found, expected, strict=True):
        refused(done, code, *words)
    eventually(lambda: not cluster.actors(), 20, "no actor is left")


def test_a_run_folder_that_cannot_be_made_is_named(cluster, settings):
    refused(cluster.run(*settings(), "--set", "run.directory=/proc/nowhere", timeout=60), 1, "run.directory = /proc/nowhere")


def test_no_cluster_at_the_address_is_told_at_once(cluster, settings):
    refused(cluster.run(*settings(), timeout=30, RAY_ADDRESS=f"127.0.0.1:{free_port()}"), 1, "RAY_ADDRESS", "no Ray cluster answers")


def test_a_damaged_checkpoint_is_passed_over_and_one_of_another_model_is_refused(cluster, settings, undisturbed):
    for name in ("cut", "other"):
        shutil.copytree(undisturbed, settings.runs / name)
    cut, other = settings.runs / "cut", settings.runs / "other"
    file = next((cut / "checkpoints" / "step-00000014").glob("*.safetensors"))
    content, settled = file.read_bytes(), (other / "config.yaml").read_bytes()
    file.write_bytes(content[: len(content) // 2])
    more = ["--set", "training.steps=15"]
    found = cluster.run_all([*settings("cut", **LARGE), *more], [*settings("other", **LARGE), *more, "--set", "model.vocab_size=300"])
    assert found[0].returncode == 0, found[0].stderr
    events = [json.loads(line) for line in (cut / "events.jsonl").read_text().splitlines()]
    unreadable, = (event for event in events if event["event"] == "checkpoint_unreadable")
    resumed = [event for event in events if event["event"] == "resumed"][-1]
    assert unreadable["step"] == 14 and str(file) in unreadable["reason"]
    assert (resumed["step"], resumed["steps_to_redo"]) == (12, 2)
    refused(found[1], 1, "model.vocab_size = 300", "257")
    assert settled == (other / "config.yaml").read_bytes()
    assert not any((folder / ".reachable").exists() for folder in (cut, other))


def full(*_):
    raise StorageError("live.json", "no space left on device")


@pytest.fixture
def driven(tmp_path, monkeypatch):
    """A driver of so many looks, and its folder."""
    monkeypatch.setattr(running, "POLL_SECONDS", 0.01)

    def make(*updates):
        driver = Driver(tmp_path, coordinator(*updates), monkeypatch)
        return driver, RunFolder(str(tmp_path), "run")
    return make


def test_a_run_does_not_end_for_want_of_an_address_in_its_folder_which_is_written_later(driven, monkeypatch):
    driver, folder = driven(*[(0, [], False)] * 3)
    written, real = [], RunFolder.write

    def write(self, name, content):
        written.append(name)
        return full() if len(written) < 3 else real(self, name, content)
    monkeypatch.setattr(RunFolder, "write", write)
    monkeypatch.setattr(live, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(storage, "delete", full)
    with driver.run:
        assert train._followed(driver.run, folder, Shown(), Signals()) == DONE
    assert len(written) == 3 and json.loads(Path(folder.path, "live.json").read_text())["address"] == "a:1"


def test_the_address_stays_in_the_folder_of_a_run_that_goes_on(driven, monkeypatch):
    driver, folder = driven((1, [("step", STEP)], False))
    with pytest.raises(ZeroDivisionError), driver.run:
        monkeypatch.setattr(Shown, "step", lambda self, values: 1 / 0)
        train._followed(driver.run, folder, Shown(), Signals())
    assert Path(folder.path, "live.json").exists() and driver.ended == []


def test_ranks_that_were_left_behind_need_no_token(driven, monkeypatch):
    driver, folder = driven()
    monkeypatch.setattr(RunFolder, "write", full)
    driver.run.check_reachable()


@pytest.mark.parametrize("damage", ["a line of the events", "the data", "no room"])
def test_a_run_that_is_done_has_not_failed_for_want_of_its_summary(tmp_path, monkeypatch, damage):
    folder, shown = RunFolder(str(tmp_path), "run"), Shown()
    folder.metrics({"step": 0, "loss": 1.0, "seconds": 1.0, "tokens": 1, "tokens_per_second": 1.0})
    Path(folder.path, "events.jsonl").write_bytes(b"\0" * 40 + b'\n{"time": 1, "event": "validation", "step": 1, "loss": 2.5, "accuracy": 0.5, "seconds": 1}\n')
    if damage != "the data":
        monkeypatch.setattr(train.Dataset, "open", lambda path: None)
        monkeypatch.setattr(train.corpus, "baselines", lambda *_: {})
    if damage == "no room":
        monkeypatch.setattr(RunFolder, "write", full)
    train._summarise(parse({}, []), folder, f"{tmp_path}/tokens", shown)
    assert ("2.5000 nats a token after 1 steps" if damage == "a line of the events" else "no summary: ") in shown.said[0]


@pytest.mark.parametrize("setting", ["give_up_seconds=120", "silence_seconds=1200", "abort_seconds=900", "form_seconds=2000",
                                     "beat_seconds=1000"])
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_bounds_that_contradict_each_other_are_refused_before_anything_is_connected(monkeypatch, setting, options):
    monkeypatch.setattr(sys, "argv", ["train", "--set", f"elastic.{setting}", *options])
    monkeypatch.setattr(session, "connect", lambda: pytest.fail("it has connected"))
    with pytest.raises(ConfigError, match="give_up_seconds"):
        train.main()


def test_a_start_that_is_refused_takes_nothing_back_from_the_autoscaler(tmp_path, monkeypatch):
    """What the run that is under way asks for."""
    withdrawn = []
    monkeypatch.setattr(sys, "argv", ["train", "--set", f"run.directory={tmp_path}", "--set", "elastic.max_nodes=8"])
    monkeypatch.setattr(session, "connect", lambda: None)
    monkeypatch.setattr(session, "disconnect", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("actors.hosts.cluster.ask_for_no_more", withdrawn.append)
    monkeypatch.setattr(train, "ClusterWatch", lambda consequence: nullcontext())
    monkeypatch.setattr(train, "Interrupt", Signals)
    monkeypatch.setattr(train.takeover, "coordinator_of", lambda folder: (1, "alive"))
    with RunFolder(str(tmp_path), "run").held(), pytest.raises(cli.JobFailed, match="under way"):
        train.main()
    assert withdrawn == []
    monkeypatch.setattr(train.takeover, "taken_over", lambda *_: None)  # it was left behind, and was of no use
    monkeypatch.setattr(session, "nodes", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main()
    assert len(withdrawn) == 1
