"""`jobs.evaluate` on checkpoints of real runs: the figures of a plain model, on any layout."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from actors.data.dataset import Dataset
from actors.model.plain import PlainModel
from actors.state import checkpoint
from actors.state.checkpoint import WholeTensors, bias_name
from orchestrator.config.run_config import load
from tests.jobs.conftest import command


@pytest.fixture(scope="module")
def trained(cluster, corpus, tmp_path_factory):
    """(configuration, newest checkpoint) of a run."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = cluster.run(*command(folder, corpus, "run", model__num_hidden_layers=4, training__steps=4, training__validation_sequences=0))
    assert done.returncode == 0, done.stderr
    return load(f"{folder}/run.yaml"), checkpoint.complete(f"{folder}/runs/run/checkpoints")[-1]


def set_to(*overrides):
    return [word for override in overrides for word in ("--set", override)]


def by_hand(config, newest, count):
    """From one plain model and its logits, sequence by sequence."""
    tensors, model = WholeTensors(newest), PlainModel(config.model, torch.float64, 0).eval()
    with torch.no_grad():
        for name, parameter in model.named.items():
            parameter.copy_(tensors.read(name))
        for layer in model.biases:
            model.biases[layer] = tensors.read(bias_name(layer))
    dataset = Dataset.open(config.data.path)
    rows, nats, tokens, correct, accepted, second, size = range(count), 0.0, 0, 0, 0, 0, 0
    prefix = f"model.layers.{model.mtp}."
    valid = dataset.valid_tokens(dataset.validation, list(rows))
    for row, length in zip(dataset.read_rows(dataset.validation, list(rows)), valid):
        ids = torch.from_numpy(row).long()
        with torch.no_grad():
            hidden = model._hidden(ids[None, :-1], [])
            logits = model._weight_product(hidden, "lm_head")[0, : length - 1]
            following = F.embedding(ids[None, 1:], model.named["model.embed_tokens.weight"])
            both = torch.cat([model._norm(following, prefix + "enorm"), model._norm(hidden, prefix + "hnorm")], dim=-1)
            inner = model._layer(model._weight_product(both, prefix + "eh_proj"), model.mtp, [])
            of_second = model._weight_product(model._norm(inner, prefix + "shared_head.norm"), "lm_head")[0, : length - 2]
        labels = ids[1:length]
        nats -= float(F.log_softmax(logits, -1)[torch.arange(len(labels)), labels].sum())
        tokens += len(labels)
        correct += int((logits.argmax(-1) == labels).sum())
        accepted += int((of_second.argmax(-1) == logits.argmax(-1)[1:]).sum())
        second += len(of_second)
        size += int((labels < 256).sum())
    return {"loss": nats / tokens, "accuracy": correct / tokens, "mtp_acceptance": accepted / second, "tokens": tokens, "bytes": size,
            "perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / size}


def test_the_same_figures_on_every_layout(cluster, trained, corpus):
    config, newest = trained
    expected = by_hand(config, newest, 6)
    evaluate = ["-m", "jobs.evaluate", "--checkpoint", newest, "--data", corpus, "--sequences", "6"]
    for_people, for_programs = cluster.run_all(
        [*evaluate, *set_to("layout.pipeline=1", "topology.ranks_per_node=1")],
        [*evaluate, *set_to("layout.expert=2", "topology.virtual_nodes=2", "schedule.kind=zbv"), "--json"])
    assert for_people.returncode == for_programs.returncode == 0, for_people.stderr + for_programs.stderr
    for words in ("perplexity", "bits per byte", "accuracy", "mtp acceptance", f"{expected['loss']:.6g}"):
        assert words in for_people.stdout, for_people.stdout
    found = json.loads(for_programs.stdout.splitlines()[-1])
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-10)
    assert found["step"] == 4 and found["sequences"] == 6 and "EP2" in found["layout"]


def test_refusals(cluster, trained, tmp_path):
    _, newest = trained
    cases = [(["--checkpoint", str(tmp_path)], 1, "manifest.json"), (["--checkpoint", newest, "--sequences", "0"], 2, "--sequences = 0"),
             (["--checkpoint", newest, "--set", "model.hidden_size=64"], 2, "the model of")]
    found = cluster.run_all(*(["-m", "jobs.evaluate", *arguments] for arguments, *_ in cases))
    for done, (_, code, words) in zip(found, cases, strict=True):
        assert done.returncode == code and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
