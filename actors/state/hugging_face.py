"""A model as other tools keep it: DeepSeek-V3's names in safetensors shards with an index, in BF16, FP32, or FP8 with scales.

Source: the released checkpoint's README_WEIGHTS and config.json. An FP8 weight has beside it NAME_scale_inv, FP32, one number for
each block of 128 x 128, by which the block's values are multiplied.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from actors.files import storage
from actors.files.tensor_files import TensorFiles
from actors.state.checkpoint import bias_name
from actors.tiles import BLOCKS, E4M3, Tiled
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import ParameterSpec, moe_layers, mtp_layer, stage_parameters

CONFIG, INDEX, ONE_FILE, SCALE = "config.json", "model.safetensors.index.json", "model.safetensors", "_scale_inv"
_OWN = {"rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range", "num_nextn_predict_layers"}
"""Keys that are compared in their own way, or say nothing of the weights."""


class FolderError(ValueError):
    """A folder that cannot be used. `str()` is one line."""


class ModelFolder:
    """Reads one; what is in memory is its index, and one tensor at a time. Raises FolderError: no such folder, or not a model."""

    def __init__(self, directory: str):
        self._directory, self._files = directory, TensorFiles(directory)
        self.config = self._json(CONFIG)
        if storage.exists(storage.join(directory, INDEX)):
            self._file_of = self._json(INDEX).get("weight_map", {})
        else:
            self._file_of = dict.fromkeys(self._checked(lambda: self._files.names(ONE_FILE), ONE_FILE), ONE_FILE)
        self._last: tuple[str, torch.Tensor] | None = None

    def check(self, model: ModelConfig) -> None:
        """Whether these are weights of that model. Raises FolderError: the first thing that differs, or is not there."""
        for key, ours in model.model_dump(exclude=_OWN).items():
            if key in self.config and self.config[key] != ours:
                raise FolderError(f"model.{key} = {ours}: {self.config[key]}, as in {self._path(CONFIG)}")
        for key, ours in _rope(model.model_dump()).items():
            if (theirs := _rope(self.config).get(key)) != ours:
                raise FolderError(f"model.{key} = {ours}: {theirs}, as in {self._path(CONFIG)}")
        specs = stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)
        if lacking := [spec for spec in specs if spec.name not in self._file_of]:
            if all(spec.layer == mtp_layer(model) for spec in lacking):
                raise FolderError(f"model.num_nextn_predict_layers = 1: 0, for {self._directory} has no such layer")
            raise FolderError(f"{self._directory}: {len(lacking)} weights are missing, the first of them {lacking[0].name}")

    def weight(self, spec: ParameterSpec) -> torch.Tensor:
        """float32, flat. Raises FolderError: it cannot be read, or has another shape."""
        found = self._tensor(spec.name)
        if tuple(found.shape) != spec.shape:
            raise FolderError(f"{self._directory}: {spec.name} has shape {tuple(found.shape)}, the model's is {spec.shape}")
        return found.flatten()

    def bias(self, layer: int, experts: int) -> torch.Tensor:
        """float32 [experts]: what steers the choice of experts. Zeros where the folder has none."""
        if bias_name(layer) not in self._file_of:
            return torch.zeros(experts)
        return self._tensor(bias_name(layer)).flatten()

    def _tensor(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            values = self._read(name)
            if values.dtype == E4M3:
                values = Tiled(values, self._read(name + SCALE).float(), BLOCKS).exact()
            self._last = name, values.double() if values.dtype == torch.float64 else values.float()
        return self._last[1]

    def _read(self, name: str) -> torch.Tensor:
        def read() -> torch.Tensor:
            return self._files.read(self._file_of[name], name).tensor()
        return self._checked(read, f"{self._file_of.get(name, INDEX)}: {name}")

    def _json(self, name: str) -> dict[str, Any]:
        found = self._checked(lambda: json.loads(storage.read_bytes(self._path(name))), name)
        if not isinstance(found, dict):
            raise FolderError(f"{self._path(name)}: not a JSON object")
        return found

    def _path(self, name: str) -> str:
        return storage.join(self._directory, name)

    def _checked(self, read: Any, what: str) -> Any:
        try:
            return read()
        except storage.StorageError as error:
            raise FolderError(str(error)) from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            raise FolderError(f"{self._directory}: {what} is missing, truncated or corrupt ({type(error).__name__})") from error


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """What positions are turned by, wherever a version of transformers keeps it."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    return {"rope_theta": float(config.get("rope_theta", parameters.get("rope_theta", 10000.0))),
            "rope_scaling.factor": float(scaling["factor"]) if kind == "yarn" else None}


# --- writing ---------------------------------------------------------------------------------------------------------------


def published_config(model: ModelConfig, *, float8: bool) -> dict[str, Any]:
    """config.json of DeepSeek-V3's form."""
    keys = model.model_dump(exclude={"rope_scaling"})
    found = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **keys, "moe_layer_freq": 1,
             "num_key_value_heads": model.num_attention_heads, "attention_bias": False, "attention_dropout": 0.0, "use_cache": True,
             "rope_scaling": model.rope_scaling.model_dump() if model.rope_scaling else None, "torch_dtype": "bfloat16"}
    if float8:
        found["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                                        "activation_scheme": "dynamic"}
    return found


def names(model: ModelConfig) -> list[tuple[str, str]]:
    """(published name, our name) of every tensor, in order. The multi-token-prediction layer has copies of embedding and head."""
    specs = stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)
    found = [(spec.name, spec.name) for spec in specs]
    if model.num_nextn_predict_layers:
        prefix = f"model.layers.{mtp_layer(model)}."
        found += [(prefix + "embed_tokens.weight", "model.embed_tokens.weight"), (prefix + "shared_head.head.weight", "lm_head.weight")]
    return found + [(bias_name(layer),) * 2 for layer in moe_layers(model, range(model.num_hidden_layers), last=True)]


def in_float8(name: str) -> bool:
    """Whether the release keeps that weight in FP8: projections of attention and of MLPs."""
    return name.endswith("_proj.weight") and "eh_proj" not in name or name.endswith("kv_a_proj_with_mqa.weight")
