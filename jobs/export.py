"""Writes a checkpoint as a folder that transformers and others load: DeepSeek-V3's names, safetensors shards with an index.

    python -m jobs.export --checkpoint runs/NAME/checkpoints/step-00000100 --output DIR [--precision bf16|fp8|fp32]

The model, and the tokenizer where it is a tokenizer.json, are those of the run's config.yaml, two folders above the checkpoint, or
of `--config`. One tensor and one shard are in memory at a time. The index comes last: without it the folder is unfinished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch

from actors.data import tokenizer
from actors.files import storage
from actors.state.checkpoint import CheckpointError, WholeTensors
from actors.state.hugging_face import CONFIG, INDEX, SCALE, in_float8, names, published_config
from actors.tiles import BLOCKS, tiled
from jobs import cli
from orchestrator.config.run_config import ConfigError, ModelConfig, RunConfig, load, parse

_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main(argv: list[str] | None = None) -> None:
    """Raises ConfigError: refused. JobFailed: the checkpoint cannot be read, or the folder not be written."""
    parser = cli.Parser(prog=cli.program("export"), description=__doc__.splitlines()[0], examples=(
        "--checkpoint runs/tiny/checkpoints/step-00000120 --output exported",
        "--checkpoint runs/tiny/checkpoints/step-00000120 --output exported-fp8 --precision fp8"))
    cli.arguments(parser)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint of a run: a path or URI")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write: a path or URI")
    parser.add_argument("--precision", choices=list(_DTYPES), default="bf16", help="of weights (default: bf16)")
    parser.add_argument("--shard-megabytes", type=float, default=4000.0, metavar="N", help="of one file (default: 4000)")
    options = parser.parse_args(argv)
    if options.shard_megabytes <= 0:
        raise ConfigError("--shard-megabytes", options.shard_megabytes, "above 0")
    if storage.exists(storage.join(options.output, INDEX)):
        raise ConfigError("--output", options.output, "a folder without a model in it")
    try:
        tensors = WholeTensors(options.checkpoint)
        config = configuration(options, tensors.model)
        shards, total = export(tensors, options.output, options.precision, int(options.shard_megabytes * 1e6))
        _copy_tokenizer(config, options.output)
    except (CheckpointError, storage.StorageError) as error:
        raise cli.JobFailed(str(error)) from error
    print(f"{options.output}: step {tensors.step}, {total / 1e6:,.1f} MB in {shards} files, {options.precision}", file=sys.stderr)


def export(tensors: WholeTensors, output: str, precision: str, shard_bytes: int) -> tuple[int, int]:
    """(files, bytes of tensors). Raises CheckpointError, StorageError."""
    model = ModelConfig.model_validate(tensors.model)
    shards, total = _shards(model, tensors, precision, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        found = dict(tensor for published, ours in shard for tensor in _made(published, tensors.read(ours), precision))
        storage.write_atomic(storage.join(output, file), safetensors.torch.save(found, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(found, file)
    _write(output, CONFIG, published_config(model, float8=precision == "fp8"))
    _write(output, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(shards), total


def _shards(model: ModelConfig, tensors: WholeTensors, precision: str, shard_bytes: int
            ) -> tuple[list[list[tuple[str, str]]], int]:
    """Tensors of each file, and the bytes of all: known before the first is written, for files are numbered `of` so many."""
    shards: list[list[tuple[str, str]]] = [[]]
    total = filled = 0
    for published, ours in names(model):
        size = _bytes(published, tensors.shape(ours), precision)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((published, ours))
        filled, total = filled + size, total + size
    return shards, total


def _bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    count = torch.Size(shape).numel()
    if precision == "fp8" and in_float8(name):
        return count + 4 * -(-shape[0] // BLOCKS[0]) * -(-shape[1] // BLOCKS[1])
    return count * (4 if _stays_exact(name) else _DTYPES[precision].itemsize)


def _made(name: str, values: torch.Tensor, precision: str) -> Iterator[tuple[str, torch.Tensor]]:
    if precision == "fp8" and in_float8(name):
        found = tiled(values, BLOCKS)
        yield from ((name, found.values), (name + SCALE, found.scale))
    else:
        yield name, values.to(torch.float32 if _stays_exact(name) else _DTYPES[precision])


def _stays_exact(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def configuration(options: Any, model: dict) -> RunConfig:
    """Of the run that `options.checkpoint` is of, or of `options.config`. Raises ConfigError: it is of another model."""
    beside = storage.join(options.checkpoint.rstrip("/"), "..", "..", "config.yaml")
    if options.config:
        config = cli.configuration(options)
    elif storage.exists(beside):
        config = load(beside, options.overrides)
    else:
        config = parse({"model": model}, options.overrides)
    if config.model.model_dump() != ModelConfig.model_validate(model).model_dump():
        raise ConfigError("--config", options.config or beside, f"the model of {options.checkpoint}")
    return config


def _copy_tokenizer(config: RunConfig, output: str) -> None:
    """What stands beside a tokenizer.json; the byte tokenizer has no file."""
    name = config.data.tokenizer
    if name == tokenizer.BYTE:
        return
    folder = name if storage.is_folder(name) else name.rpartition("/")[0] or "."
    for file in _TOKENIZER_FILES:
        if storage.exists(storage.join(folder, file)):
            storage.write_atomic(storage.join(output, file), storage.read_bytes(storage.join(folder, file)))


def _write(output: str, name: str, content: dict) -> None:
    storage.write_atomic(storage.join(output, name), json.dumps(content, indent=2).encode())


if __name__ == "__main__":
    sys.exit(cli.run(main))
