"""Checkpoints: readable by any layout, or refused in one line; an interrupted save harms nothing."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from pyarrow._fs import _MockFileSystem
from runtime import LAYOUTS, configured, form, same, state, train

from actors.files import storage
from actors.state import checkpoint
from actors.state.checkpoint import CheckpointError, Manifest, PieceWriter
from actors.state.optimizer import Optimizer
from orchestrator.config.run_config import OptimizerSection
from orchestrator.model.parameters import ParameterSpec
from orchestrator.state.ownership import Bucket

SPECS = (ParameterSpec("first", (3, 2)), ParameterSpec("second", (5,)))
MODEL = {"hidden_size": 3}
LAYER = 2


def owned(seed):
    """A rank's shards and biases; `seed` None: zeros, to be filled."""
    bucket = Bucket(0, (0,), (0,), SPECS, True, False, ((0,),))
    shards = Optimizer(0, (bucket,), OptimizerSection(), torch.float64, torch.device("cpu")).shards
    biases = {LAYER: torch.zeros(4, dtype=torch.float64)}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(3)]
        shards[0].master.copy_(parts[0])
        shards[0].set_moments(parts[1], parts[2], seed)
        biases[LAYER] += torch.randn(4, generator=generator, dtype=torch.float64)
    return shards, biases


def save(root, step):
    """A checkpoint of the state made from `step`; its folder."""
    directory = checkpoint.folder(str(root), step)
    pieces = PieceWriter(directory, 0, *owned(step)).finish()
    checkpoint.commit(directory, Manifest(step, MODEL, "float64", tuple(pieces)))
    return directory


def load(directory):
    """Raises CheckpointError unless the folder holds exactly what `save` put there."""
    manifest = checkpoint.read_manifest(directory)
    shards, biases = owned(None)
    checkpoint.restore_shards(directory, manifest.pieces, shards, biases, manifest.step)
    expected, expected_biases = owned(manifest.step)
    assert torch.equal(shards[0].master, expected[0].master) and torch.equal(biases[LAYER], expected_biases[LAYER])
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(shards[0].moment(kind), expected[0].moment(kind))
    assert shards[0].steps == manifest.step
    return manifest


def refused(directory):
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("checkpoint")
    return text


def test_what_is_saved_is_loaded(tmp_path):
    assert load(save(tmp_path, 7)).step == 7


def test_every_truncation_is_refused(tmp_path):
    directory = save(tmp_path, 3)
    for name in ("generation-0-rank-00000.safetensors", "manifest.json"):
        path = tmp_path / "step-00000003" / name
        whole = path.read_bytes()
        for length in range(0, len(whole), 1 if len(whole) < 1500 else 3):
            path.write_bytes(whole[:length])
            assert name in refused(directory)
        path.write_bytes(whole)
    assert load(directory)


def test_every_changed_byte_is_refused_or_harmless(tmp_path):
    """Harmless: white space of a header, say. What is loaded is what was saved, or nothing is."""
    directory, rng = save(tmp_path, 3), random.Random(0)
    manifest, refusals = checkpoint.read_manifest(directory), 0
    for name in ("generation-0-rank-00000.safetensors", "manifest.json"):
        path = tmp_path / "step-00000003" / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 2):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
            try:
                assert load(directory) == manifest
            except CheckpointError as error:
                assert "\n" not in str(error)
                refusals += 1
        path.write_bytes(whole)
    assert refusals > 0.8 * sum(path.stat().st_size for path in (tmp_path / "step-00000003").iterdir()) / 2


def test_what_is_missing_is_named(tmp_path):
    directory = save(tmp_path, 3)
    os.rename(tmp_path / "step-00000003" / "generation-0-rank-00000.safetensors", tmp_path / "aside")
    assert refused(directory) == f"checkpoint file {directory}/generation-0-rank-00000.safetensors: does not exist"
    os.remove(tmp_path / "step-00000003" / "manifest.json")
    assert refused(directory) == f"checkpoint {directory}/manifest.json: does not exist"
    assert checkpoint.complete(str(tmp_path)) == [] and checkpoint.complete(str(tmp_path / "nowhere")) == []


def test_a_piece_that_nobody_wrote_is_named(tmp_path):
    directory = save(tmp_path, 3)
    manifest = checkpoint.read_manifest(directory)
    rest = tuple(piece for piece in manifest.pieces if (piece.name, piece.kind) != ("second", "exp_avg"))
    checkpoint.commit(directory, Manifest(3, MODEL, "float64", rest))
    assert refused(directory) == "checkpoint: second (exp_avg) lacks 5 of 5 values"


def test_another_format_is_refused(tmp_path):
    directory = save(tmp_path, 3)
    path = tmp_path / "step-00000003" / "manifest.json"
    for content, why in ((json.dumps(json.loads(path.read_text()) | {"format": 9}), "format is not 1"), ("12", "not a manifest"),
                         ("[]", "not a manifest"), ("\xff", "not a manifest")):
        path.write_bytes(content.encode("latin-1"))
        assert why in refused(directory)


def prune(root, keep):
    """What a run does away with at its begin, and after each save."""
    checkpoint.clear_unfinished(root)
    for directory in checkpoint.complete(root)[:-keep]:
        checkpoint.discard(directory)


def test_the_newest_are_kept_and_leftovers_go(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    for unfinished in (3, 9):
        PieceWriter(checkpoint.folder(str(tmp_path), unfinished), 0, *owned(1)).finish()
    (tmp_path / "notes.txt").write_text("not ours")
    prune(str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000006", "step-00000008"]
    checkpoint.clear_unfinished(str(tmp_path / "nowhere"))


# --- killed while saving ---------------------------------------------------------------------------------------------


def save_until_killed(root, kill_at):
    """In a process of its own: die at the `kill_at`-th touch of a file, by SIGKILL. Ends with 0 when there are fewer."""
    touches = 0

    def touch():
        nonlocal touches
        touches += 1
        if touches == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(root) in str(arguments[0]):
            touch()

    class HalfWritten:
        """Every flush of a file is two: one of the first half of the bytes."""

        def __init__(self, flush):
            self._flush = flush

        def __call__(self, descriptor):
            size = os.fstat(descriptor).st_size
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isfile(path):
                content = Path(path).read_bytes()
                os.truncate(path, size // 2)
                touch()
                with open(path, "wb") as stream:
                    stream.write(content)
            touch()
            self._flush(descriptor)

    os.fsync = HalfWritten(os.fsync)
    delete, delete_tree = storage.delete, storage.delete_tree
    storage.delete = lambda uri: (touch(), delete(uri), touch())

    def one_by_one(uri):
        for entry in reversed(storage.list_folder(uri)):  # a file system may take any order: the manifest comes last here
            storage.delete(entry.uri)
        delete_tree(uri)

    storage.delete_tree = one_by_one
    sys.addaudithook(audit)
    save(root, 2)
    prune(str(root), 1)


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    context, seen, kill_at, code = multiprocessing.get_context("fork"), set(), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        kill_at += 1
        root = tmp_path / str(kill_at)
        save(root, 1)
        process = context.Process(target=save_until_killed, args=(root, kill_at))
        process.start()
        process.join()
        code = process.exitcode
        newest = [load(directory).step for directory in checkpoint.complete(str(root))][-1]
        seen.add(newest)
        prune(str(root), 1)
        assert [path.name for path in root.iterdir()] == [f"step-{newest:08d}"]
    assert code == 0 and kill_at > 12 and seen == {1, 2}


# --- other layouts, other file systems -------------------------------------------------------------------------------


def test_any_layout_reads_what_any_layout_wrote(ranks, tmp_path):
    """Handed on from layout to layout, and back to the first: masters, moments and biases stay as they were."""
    config, layout = configured("PP2xEP2", "training.steps=2")
    assert train(ranks, tmp_path, config, layout).error is None
    original, directory = state(ranks, layout), checkpoint.complete(f"{tmp_path}/run/checkpoints")[-1]
    assert {kind for _, kind in original} == {"master", "exp_avg", "exp_avg_sq", "bias"}
    assert all(values.count_nonzero() for (name, kind), values in original.items() if kind in ("master", "bias"))
    for number, name in enumerate([*list(LAYOUTS)[1:], "PP2xEP2"]):
        config, layout = configured(name)
        form(ranks, config, layout)
        manifest = checkpoint.read_manifest(directory)
        ranks.start("restore", [(directory, manifest.pieces, manifest.step)] * layout.size).results(60)
        assert same(state(ranks, layout), original), name
        directory = f"{tmp_path}/{number}"
        ranks.start("snapshot", [(directory,)] * layout.size).results(60)
        found = ranks.start("saved", [(directory,)] * layout.size).results(60)
        checkpoint.commit(directory, Manifest(2, manifest.model, manifest.dtype, tuple(p for pieces in found for p in pieces)))


def test_a_run_in_a_folder_named_by_uri(ranks, tmp_path):
    config, layout = configured("PP2xEP2", "training.steps=2")
    assert train(ranks, f"file://{tmp_path}/runs", config, layout).error is None
    longer, _ = configured("PP2xEP2", "training.steps=3")
    run = train(ranks, f"file://{tmp_path}/runs", longer, layout)
    assert run.error is None and [step["step"] for step in run.steps] == [2]
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()


@pytest.fixture
def memory(monkeypatch):
    """`mock://`: pyarrow's file system in memory, which can neither append nor rename over."""
    system, resolve = _MockFileSystem(datetime.datetime(2020, 1, 1)), storage.resolve
    monkeypatch.setattr(storage, "resolve", lambda uri: (system, uri[7:]) if uri.startswith("mock://") else resolve(uri))
    system.create_dir("bucket")
    assert not isinstance(system, fs.LocalFileSystem)
    return "mock://bucket/checkpoints"


def test_an_object_store(memory, monkeypatch):
    write = storage.write_atomic

    def write_in_folder(uri, content):
        system, path = storage.resolve(uri)
        system.create_dir(path.rpartition("/")[0], recursive=True)  # object stores have no folders to make
        write(uri, content)

    monkeypatch.setattr(storage, "write_atomic", write_in_folder)
    for step in (1, 2, 3):
        save(memory, step)
    prune(memory, 2)
    assert [load(directory).step for directory in checkpoint.complete(memory)] == [2, 3]
    storage.delete(f"{checkpoint.folder(memory, 3)}/manifest.json")
    assert [load(directory).step for directory in checkpoint.complete(memory)] == [2]
    assert "does not exist" in refused(checkpoint.folder(memory, 3)).lower()
