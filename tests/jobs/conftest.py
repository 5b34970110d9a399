"""What tests of whole runs share: a small corpus, and the configuration of a run of seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

CONFIG = {
    "model": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8,
              "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
              "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "initializer_range": 0.02},
    "data": {"sequence_length": 32},
    "training": {"steps": 6, "batch_sequences": 8, "microbatch_sequences": 1, "validation_sequences": 8, "validate_every": 3,
                 "dtype": "float64"},
    "layout": {"pipeline": 2, "expert": 1, "data": 1},
    "topology": {"virtual_nodes": 1, "ranks_per_node": 2},
    "checkpoint": {"every": 2, "keep": 2},
    "elastic": {},
}


@pytest.fixture(scope="session")
def corpus(cluster, tmp_path_factory):
    """Tokens of a few files of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    inputs = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("c*.py"))
    done = cluster.run("-m", "jobs.tokenize", "--input", *inputs, "--tokenizer", "byte", "--output", f"{folder}/tokens",
                       "--set", "data.sequence_length=32", "--set", "data.validation_fraction=0.2")
    assert done.returncode == 0, done.stderr
    return f"{folder}/tokens"


def command(folder: Path, corpus: str, name: str, **changes) -> list[str]:
    """Write the configuration of run `name` in `folder`; the arguments of jobs.train. `section__key=value` changes it."""
    tree = json.loads(json.dumps(CONFIG)) | {"run": {"name": name, "directory": str(folder / "runs")}}
    tree["data"]["path"] = corpus
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        tree[section][leaf] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["-m", "jobs.train", "--config", str(path)]


@pytest.fixture
def settings(tmp_path, corpus):
    """Writes the configuration of a run; returns the arguments of jobs.train."""
    def write(name: str = "run", **changes) -> list[str]:
        return command(tmp_path, corpus, name, **changes)

    write.runs = tmp_path / "runs"
    return write


@pytest.fixture
def bench(capsys, monkeypatch):
    """`python -m jobs.bench` in this process: (exit code, standard output, standard error)."""
    from jobs import bench, cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets: it is to end with the test
        monkeypatch.setattr(sys, "argv", ["jobs.bench", *arguments])
        return cli.run(bench.main), *capsys.readouterr()

    return run


def refused(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """Exit code, one line on standard error, nothing like a traceback."""
    assert done.returncode == code, (done.stdout[-2000:], done.stderr[-2000:])
    told = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(told) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert all(word in told[0] for word in words), told


LARGE = {"model__moe_intermediate_size": 1024, "training__steps": 14, "training__validation_sequences": 0}
"""State large enough that writing it takes a while."""


@pytest.fixture(scope="session")
def undisturbed(cluster, corpus, tmp_path_factory):
    """Folder of a run with large state that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cluster.run(*command(folder, corpus, "whole", **LARGE))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "whole"
