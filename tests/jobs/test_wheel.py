"""The wheel, installed beside nothing else of ours and started from a folder with modules of the same names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import packaged
from tests.cluster import REPOSITORY
from tests.jobs.conftest import CONFIG


def done(words: list[str], cwd: Path, timeout: float, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    return subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built from a copy, for a build leaves folders in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("orchestrator", "actors", "jobs", "dashboards"):
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder / "source")
    try:  # from 70.1 on it makes wheels by itself
        here = tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) >= (70, 1)
    except importlib.metadata.PackageNotFoundError:
        here = False
    for words in (["wheel", "--wheel-dir", "wheels", *(["--no-build-isolation"] if here else []), "./source"],
                  ["install", "--target", "site", "--no-index", "--find-links", "wheels", "dualray"]):
        quiet = ["--quiet", "--no-deps", "--disable-pip-version-check"]
        pip = done([sys.executable, "-m", "pip", words[0], *quiet, *words[1:]], folder, 300)
        assert pip.returncode == 0, pip.stderr
    return folder / "site"


@pytest.fixture
def dualray(site, tmp_path):
    """The command, in a folder that is hostile to it."""
    strange = tmp_path / "strange"
    (strange / "jobs").mkdir(parents=True)
    for name in ("actors.py", "orchestrator.py", "jobs/__init__.py"):
        (strange / name).write_text(f"raise SystemExit('{name} of the working directory was imported')\n")

    def run(*words: str, timeout: float = 60) -> subprocess.CompletedProcess:
        return done([sys.executable, str(site / "bin" / "dualray"), *words], strange, timeout, PYTHONPATH=str(site))

    run.folder = strange
    return run


def test_files_of_the_tree_are_in_the_wheel(site, dualray):
    """As they are here."""
    ours = packaged.files()
    listed = dualray("config", "--file")
    assert listed.stdout.split() == list(ours), listed.stderr
    for name, path in ours.items():
        there = (site if name.startswith("dashboards/") else site / "jobs") / name
        assert there.read_bytes() == Path(path).read_bytes()
    assert dualray("config", "--file", "dashboards/prometheus.yml").stdout == f"{site}/dashboards/prometheus.yml\n"
    assert (site / "actors" / "telemetry" / "page.html").is_file()


def test_keys_are_told_and_packaged_configurations_found(site, dualray):
    assert json.loads(dualray("config", "run.name", "--json").stdout)["keys"][0]["default"] == "run"
    planned = dualray("plan", "schedule", "--config", "tiny", "--microbatches", "4")
    assert (planned.returncode, len(planned.stdout.splitlines())) == (0, 2), planned.stderr  # layout.pipeline: 2
    assert dualray("config", "--file", "configs/tiny.yaml").stdout == f"{site}/jobs/configs/tiny.yaml\n"
    dry = dualray("train", "--config", "deepseek_v3", "--set", "topology.virtual_nodes=256", "--dry-run")
    assert dry.returncode == 0 and "2048 ranks" in dry.stdout.replace(",", ""), dry.stderr


def test_a_file_of_the_working_directory_goes_before_and_what_is_neither_is_refused(dualray):
    (dualray.folder / "tiny.yaml").write_text("layout: {pipeline: 4}\n")
    assert len(dualray("plan", "schedule", "--config", "tiny.yaml").stdout.splitlines()) == 4
    assert len(dualray("plan", "schedule", "--config", "tiny").stdout.splitlines()) == 2
    refused = dualray("train", "--config", "huge")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("--config = huge: ") and refused.stderr.endswith("deepseek_v3, moe_16b, tiny\n")


@pytest.mark.long
def test_ranks_and_tasks_on_ray_import_the_same_modules(dualray):
    """Ray has its workers look in the driver's working directory first."""
    (dualray.folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. \n" * 400)
    (dualray.folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    changes = ["--config", "run.yaml", "--set", "training.validation_sequences=0", "--set", "data.validation_fraction=0.01",
               "--set", "training.steps=2", "--set", "data.path=tokens"]
    tokenized = dualray("tokenize", "--input", "text.txt", "--output", "tokens", *changes, timeout=200)
    assert tokenized.returncode == 0, tokenized.stderr
    trained = dualray("train", *changes, timeout=300)
    assert trained.returncode == 0, (trained.stdout, trained.stderr)
    assert len((dualray.folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 2
