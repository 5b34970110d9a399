"""Checkpoints: written beside the training, atomic, and readable by any layout.

A checkpoint is a folder `step-00000100` of safetensors files, one per rank that owns state, and `manifest.json`, which
is written last: without it the folder does not count. The manifest lists every piece (a flat range of one kind of state
of one weight) with the hash of its bytes; whoever loads a piece verifies it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy
import safetensors.torch
import torch

from actors.calls.messages import SavedPiece
from actors.errors import first_line
from actors.files import storage
from actors.files.tensor_files import TensorFiles
from actors.state.optimizer import OwnedShard, owned_by_name
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import stage_parameters

FORMAT = 1
MANIFEST = "manifest.json"
MASTER, EXP_AVG, EXP_AVG_SQ, BIAS = "master", "exp_avg", "exp_avg_sq", "bias"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. `str()` is one line."""


@dataclass(frozen=True)
class Manifest:
    """`step`: committed steps in it. `model`: the model section, which must be the same to load."""

    step: int
    model: dict
    dtype: str
    pieces: tuple[SavedPiece, ...]


class PieceWriter:
    """Copies a rank's state at once and writes it in a thread of its own.

    generation: in the file's name, so that a rank which does not know yet that it was given up overwrites nobody's.
    """

    def __init__(self, directory: str, rank: int, shards: Iterable[OwnedShard], biases: Mapping[int, torch.Tensor],
                 generation: int = 0):
        self._file = f"generation-{generation}-rank-{rank:05d}.safetensors"
        self.directory, self._path = directory, storage.join(directory, self._file)
        self._tensors: dict[tuple[str, str, int, int], torch.Tensor] = {}
        for owned in shards:
            if owned.bucket.owners[owned.shard][0] == rank:
                self._copy(owned)
        for layer, bias in biases.items():
            self._tensors[bias_name(layer), BIAS, 0, bias.numel()] = bias.detach().cpu().clone()
        self._pieces: list[SavedPiece] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> list[SavedPiece]:
        """Wait for the file. Raises CheckpointError."""
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(f"checkpoint file {self._path}: {_reason(self._error)}")
        return self._pieces

    def _copy(self, owned: OwnedShard) -> None:
        flats = {MASTER: owned.master, EXP_AVG: owned.moment(EXP_AVG), EXP_AVG_SQ: owned.moment(EXP_AVG_SQ)}
        flats = {kind: flat.detach().cpu().clone() for kind, flat in flats.items()}
        for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
            for kind, flat in flats.items():
                self._tensors[spec.name, kind, start, stop] = flat[offset : offset + stop - start]

    def _run(self) -> None:
        try:
            if self._tensors:
                named = {_key(*identity): tensor.contiguous() for identity, tensor in self._tensors.items()}
                storage.write_atomic(self._path, safetensors.torch.save(named))
                self._pieces = [SavedPiece(*identity, self._file, _sha256(tensor))
                                for identity, tensor in self._tensors.items()]
        except Exception as error:  # handed to whoever calls finish()
            self._error = error
        self._tensors = {}


def restore_shards(directory: str, pieces: Iterable[SavedPiece], shards: Iterable[OwnedShard],
                   biases: Mapping[int, torch.Tensor], steps: int) -> None:
    """Fill owned shards and gate biases from the pieces that overlap them. Raises CheckpointError: a piece is missing,
    its file is truncated, or its bytes are not those that were written."""
    index: dict[tuple[str, str], list[SavedPiece]] = {}
    for piece in pieces:
        index.setdefault((piece.name, piece.kind), []).append(piece)
    reader, shards = _PieceReader(directory), list(shards)
    moments = {id(owned): (torch.zeros_like(owned.master), torch.zeros_like(owned.master)) for owned in shards}
    for name, ranges in owned_by_name(shards).items():
        for owned, start, stop, offset in ranges:
            for kind, flat in zip((MASTER, EXP_AVG, EXP_AVG_SQ), (owned.master, *moments[id(owned)])):
                _fill(flat[offset : offset + stop - start], start, index.get((name, kind), []), reader, f"{name} ({kind})")
    for owned in shards:
        if steps:
            owned.set_moments(*moments[id(owned)], steps)
        else:
            owned.forget()
    for layer, bias in biases.items():
        _fill(bias, 0, index.get((bias_name(layer), BIAS), []), reader, bias_name(layer))


def check_model(manifest: Manifest, model: ModelConfig, directory: str) -> None:
    """Raises CheckpointError: the checkpoint is of another model."""
    ours = model.model_dump(mode="json")
    for key, value in manifest.model.items():
        if ours.get(key) != value:
            raise CheckpointError(f"model.{key} = {ours.get(key)}: the checkpoint {directory} has {value}")


class WholeTensors:
    """Weights and gate biases of a checkpoint, one after the other. `step`, `model`: as in its manifest. Raises CheckpointError."""

    def __init__(self, directory: str):
        manifest = read_manifest(directory)
        self.step, self.model, self._reader = manifest.step, manifest.model, _PieceReader(directory)
        self._pieces: dict[str, list[SavedPiece]] = {}
        for piece in manifest.pieces:
            if piece.kind in (MASTER, BIAS):
                self._pieces.setdefault(piece.name, []).append(piece)
        config = ModelConfig.model_validate(manifest.model)
        specs = stage_parameters(config, range(config.num_hidden_layers), first=True, last=True)
        self._shapes = {spec.name: spec.shape for spec in specs}
        self._experts, self._dtype = config.n_routed_experts, torch.float64 if manifest.dtype == "float64" else torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name, (self._experts,))

    def read(self, name: str) -> torch.Tensor:
        """In the dtype of the masters. Raises CheckpointError."""
        whole = torch.empty(torch.Size(self.shape(name)).numel(), dtype=self._dtype)
        _fill(whole, 0, self._pieces.get(name, []), self._reader, name)
        return whole.view(self.shape(name))


def read_parameters(directory: str) -> dict[str, numpy.ndarray]:
    """Every weight's master values, flat and in float64, by name: for comparing small models."""
    tensors = WholeTensors(directory)
    return {name: tensors.read(name).flatten().double().numpy() for name in tensors._shapes}


def bias_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"


# --- folders, as the coordinator sees them ---------------------------------------------------------------------------


def folder(root: str, step: int) -> str:
    return storage.join(root, f"step-{step:08d}")


def commit(directory: str, manifest: Manifest) -> None:
    """Make the checkpoint count: its manifest appears whole or not at all. Raises CheckpointError."""
    body = {"format": FORMAT, **asdict(manifest)}
    try:
        storage.write_atomic(storage.join(directory, MANIFEST), json.dumps(body | {"sha256": _sha256_of(body)}).encode())
    except (storage.StorageError, OSError) as error:
        raise CheckpointError(f"checkpoint manifest {directory}: {_reason(error)}") from error


def read_manifest(directory: str) -> Manifest:
    """Raises CheckpointError: no manifest, or one that is truncated, corrupt or of another format."""
    path = storage.join(directory, MANIFEST)
    try:
        body = json.loads(storage.read_bytes(path))
        if body["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path}: format is not {FORMAT}")
        if body.pop("sha256") != _sha256_of(body):
            raise CheckpointError(f"checkpoint {path}: corrupt (hash differs)")
        del body["format"]
        return Manifest(**body | {"pieces": tuple(SavedPiece(**piece) for piece in body["pieces"])})
    except storage.StorageError as error:
        raise CheckpointError(f"checkpoint {path}: {_reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: truncated or not a manifest") from error


def complete(root: str) -> list[str]:
    """Folders of the checkpoints that count, oldest first."""
    if not storage.exists(root):
        return []
    return [name for name in _folders(root) if storage.exists(storage.join(name, MANIFEST))]


def clear_unfinished(root: str) -> None:
    """Delete what interrupted saves left behind; nothing may be saving. Raises StorageError."""
    if storage.exists(root):
        for directory in set(_folders(root)).difference(complete(root)):
            discard(directory)


def discard(directory: str) -> None:
    """Remove a checkpoint, manifest first: what an interruption leaves of it does not count. Raises StorageError."""
    storage.delete(storage.join(directory, MANIFEST))
    storage.delete_tree(directory)


def _folders(root: str) -> list[str]:
    return [entry.uri for entry in storage.list_folder(root) if entry.is_folder and entry.name.startswith("step-")]


# --- bytes -----------------------------------------------------------------------------------------------------------


class _PieceReader:
    """Reads pieces by range, each file's header once, each piece's hash always."""

    def __init__(self, directory: str):
        self._directory, self._files = directory, TensorFiles(directory)

    def read(self, piece: SavedPiece) -> torch.Tensor:
        path = storage.join(self._directory, piece.file)
        try:
            found = self._files.read(piece.file, _key(piece.name, piece.kind, piece.start, piece.stop))
            if found.shape != (piece.stop - piece.start,):
                raise ValueError(found.shape)
        except (storage.StorageError, OSError) as error:
            raise CheckpointError(f"checkpoint file {path}: {_reason(error)}") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"checkpoint file {path}: truncated or corrupt header") from error
        if hashlib.sha256(found.raw).hexdigest() != piece.sha256:
            raise CheckpointError(f"checkpoint file {path}: {piece.name} ({piece.kind}) is truncated or corrupt (hash differs)")
        return found.tensor()


def _fill(target: torch.Tensor, start: int, pieces: list[SavedPiece], reader: _PieceReader, label: str) -> None:
    """Copy [start, start + len) of a weight out of the pieces that overlap it."""
    filled, stop = 0, start + target.numel()
    for piece in pieces:
        first, last = max(start, piece.start), min(stop, piece.stop)
        if first < last:
            target[first - start : last - start] = reader.read(piece)[first - piece.start : last - piece.start].to(target)
            filled += last - first
    if filled != target.numel():
        raise CheckpointError(f"checkpoint: {label} lacks {target.numel() - filled} of {target.numel()} values")


def _key(name: str, kind: str, start: int, stop: int) -> str:
    return f"{name}|{kind}|{start}|{stop}"


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def _sha256_of(body: dict) -> str:
    """Of a manifest, whether its values were just made or were read back."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or first_line(error)
