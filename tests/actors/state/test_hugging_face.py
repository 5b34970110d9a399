"""Models that come from transformers and go back there: the same logits, whatever the layout and the form of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runtime import configured, state, train
from safetensors.torch import load_file
from transformers import modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as published

from actors.state import checkpoint
from actors.state.checkpoint import MASTER
from actors.state.hugging_face import SCALE, FolderError, ModelFolder, in_float8
from jobs import export
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import stage_parameters
from tests.actors.model.helpers import Pipeline, random_tokens
from tests.actors.model.test_transformers import ExactTorch, published_config
from tests.reference.float8 import dequantised

NO_MTP = "model.num_nextn_predict_layers=0"


@pytest.fixture
def exact(monkeypatch):
    """transformers without its casts to FP32."""
    for module in (published, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", ExactTorch())


def random_model(model: ModelConfig, folder: Path) -> Path:
    """A model of transformers with random weights, saved by itself in FP32."""
    torch.manual_seed(4)
    theirs = published.DeepseekV3ForCausalLM(published_config(model))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape))
    theirs.save_pretrained(folder)
    return folder


def their_logits(folder: Path, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    theirs = published.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager",
                                                             experts_implementation="eager")
    with torch.no_grad():
        return theirs.eval()(input_ids=tokens[:, :-1]).logits


def our_logits(weights: dict, biases: dict, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Of our model in float64 with these flat weights, through a head written here."""
    body = Pipeline(model)
    for name, weight in body.weights.items():
        weight.value.copy_(weights[name].view(weight.value.shape))
    for layer, bias in body.biases.items():
        bias.copy_(biases[layer])
    body.chunks[0].last = False
    (tape,) = body.forward(tokens, keep=False)
    normed = F.rms_norm(tape.output, tape.output.shape[-1:], body.weights["model.norm.weight"].value, model.rms_norm_eps)
    return F.linear(normed, body.weights["lm_head.weight"].value)


def of_state(found: dict, model: ModelConfig) -> tuple[dict, dict]:
    """(weights, biases) of what ranks hold."""
    return ({name: values for (name, kind), values in found.items() if kind == MASTER},
            {int(name): values for (name, kind), values in found.items() if kind == "bias"})


@pytest.mark.parametrize("name", ["PP2xEP2", "EP4", "one rank"])
def test_there_and_back(ranks, exact, tmp_path, name):
    """Loaded into any layout: the same logits. Trained for steps, exported in FP32 and loaded there: the same again."""
    config, layout = configured(name, NO_MTP, f"training.init_from={tmp_path}/theirs", "training.steps=2", "checkpoint.every=2")
    model, tokens = config.model, random_tokens(config.model, 2, 12)
    folder = random_model(model, tmp_path / "theirs")
    ModelFolder(str(folder)).check(model)
    before = {}

    def look() -> None:
        before.update(state(ranks, layout))

    run = train(ranks, tmp_path, config, layout, before={0: look})
    assert run.error is None, run.error
    expected = their_logits(folder, model, tokens)
    assert float((our_logits(*of_state(before, model), model, tokens) - expected).abs().max()) < 1e-9

    after = of_state(state(ranks, layout), model)
    newest = checkpoint.complete(str(tmp_path / "run" / "checkpoints"))[-1]
    (tmp_path / "config.yaml").write_text("")
    export.main(["--checkpoint", newest, "--output", str(tmp_path / "ours"), "--precision", "fp32", "--shard-megabytes", "0.02"])
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    rounded = {key: {k: v.float().double() for k, v in part.items()} for key, part in zip(("weights", "biases"), after)}
    again = their_logits(tmp_path / "ours", model, tokens)
    assert float((our_logits(rounded["weights"], rounded["biases"], model, tokens) - again).abs().max()) < 1e-9
    assert float((again - expected).abs().max()) > 1e-4  # it has learned something


def exported(ranks, tmp_path, precision, *overrides):
    """(folder, config, weights, biases) of a run of two steps."""
    config, layout = configured("PP2xEP2", "training.steps=2", "checkpoint.every=2", *overrides)
    assert train(ranks, tmp_path, config, layout).error is None
    newest = checkpoint.complete(str(tmp_path / "run" / "checkpoints"))[-1]
    export.main(["--checkpoint", newest, "--output", str(tmp_path / precision), "--precision", precision])
    return tmp_path / precision, config, *of_state(state(ranks, layout), config.model)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
def test_every_form_is_read_as_it_was_written(ranks, tmp_path, precision):
    """Names, dtypes and values as published: of FP8 weights against blocks made one number at a time."""
    wide = "model.hidden_size=136", "model.v_head_dim=72", "model.num_attention_heads=2", "model.kv_lora_rank=24"
    folder, config, weights, biases = exported(ranks, tmp_path, precision, *wide)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    mtp = f"model.layers.{config.model.num_hidden_layers}."
    assert torch.equal(tensors[mtp + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[mtp + "shared_head.head.weight"], tensors["lm_head.weight"])
    reader = ModelFolder(str(folder))
    reader.check(config.model)
    for spec in stage_parameters(config.model, range(config.model.num_hidden_layers), first=True, last=True):
        whole = weights[spec.name].view(spec.shape)
        if precision == "fp8" and in_float8(spec.name):
            assert tensors[spec.name].dtype == torch.float8_e4m3fn
            rows, columns = (-(-side // 128) for side in spec.shape)
            assert tensors[spec.name + SCALE].shape == (rows, columns) and tensors[spec.name + SCALE].dtype == torch.float32
            wanted = torch.from_numpy(dequantised(whole.float().numpy(), 128, 128).astype(np.float32))
        else:
            wanted = whole.to(torch.float32 if precision == "fp32" else torch.bfloat16).float()
            assert tensors[spec.name].dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert torch.equal(reader.weight(spec), wanted.flatten()), spec.name
    for layer, bias in biases.items():
        assert torch.equal(reader.bias(layer, len(bias)), bias.float())
        assert tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert ("quantization_config" in reader.config) is (precision == "fp8")


def test_a_run_begins_with_an_exported_fp8_model(ranks, tmp_path):
    """Logits against weights that were dequantised by hand; with the layer for multi-token prediction."""
    folder, config, weights, biases = exported(ranks, tmp_path, "fp8")
    again, layout = configured("EP4", f"training.init_from={folder}", "training.steps=1")
    found = {}
    run = train(ranks, tmp_path / "again", again, layout, before={0: lambda: found.update(state(ranks, layout))})
    assert run.error is None, run.error
    by_hand = {}
    for spec in stage_parameters(config.model, range(config.model.num_hidden_layers), first=True, last=True):
        whole = weights[spec.name].view(spec.shape)
        by_hand[spec.name] = (torch.from_numpy(dequantised(whole.float().numpy(), 128, 128)).float() if in_float8(spec.name)
                              else whole.bfloat16()).double()
    tokens = random_tokens(config.model, 2, 12)
    rounded = {layer: bias.float().double() for layer, bias in biases.items()}
    assert float((our_logits(*of_state(found, config.model), config.model, tokens)
                  - our_logits(by_hand, rounded, config.model, tokens)).abs().max()) < 1e-9


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config, _ = configured("one rank", NO_MTP)
    return config, random_model(config.model, tmp_path_factory.mktemp("model"))


def test_what_is_not_this_model_is_refused_in_one_line(small, tmp_path):
    config, folder = small
    for change, words in ((["model.hidden_size=32"], "model.hidden_size = 32: 16"), (["model.rope_theta=5e5"], "model.rope_theta = "),
                          (["model.num_nextn_predict_layers=1"], "model.num_nextn_predict_layers = 1: 0")):
        other, _ = configured("one rank", NO_MTP, *change)
        with pytest.raises(FolderError, match=words) as refused:
            ModelFolder(str(folder)).check(other.model)
        assert "\n" not in str(refused.value)
    with pytest.raises(FolderError, match="config.json"):
        ModelFolder(str(tmp_path))


def test_a_damaged_folder_is_named(small, tmp_path):
    config, folder = small
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    reader = ModelFolder(str(tmp_path))
    specs = stage_parameters(config.model, range(config.model.num_hidden_layers), first=True, last=True)
    with pytest.raises(FolderError, match="is missing, truncated or corrupt"):
        for spec in specs:
            reader.weight(spec)
    shard.write_bytes(b"12")
    with pytest.raises(FolderError, match="model.safetensors"):
        ModelFolder(str(tmp_path)).check(config.model)
