"""What `jobs.config` prints, and where `--config` looks."""

from __future__ import annotations

import json
import os
import sys

import pytest

from jobs import cli, config, packaged
from orchestrator.config.run_config import RunConfig
from tests.cluster import REPOSITORY


@pytest.fixture
def told(capsys, monkeypatch):
    """`python -m jobs.config` in this process: (exit code, standard output, standard error)."""
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jobs.config", *arguments])
        return cli.run(config.main), *capsys.readouterr()

    return run


def test_the_documentation_is_current(told):
    code, out, err = told("--markdown")
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert (code, err) == (0, "") and written == out, "python -m jobs.config --markdown > docs/configuration.md"


def test_all_keys_of_all_sections(told):
    code, out, err = told()
    assert (code, err) == (0, "")
    for section, field in RunConfig.model_fields.items():
        assert all(f"  {section}.{key}\n" in out for key in field.annotation.model_fields if f"{section}.{key}" != "schedule.costs")


def test_one_key(told):
    assert told("elastic.beat_seconds") == (
        0, "elastic: How a run goes on while nodes come and go.\n\n"
           "  elastic.beat_seconds\n      between two signs of life of a rank\n"
           "      a finite number (above 0), in seconds; default 0.2\n", "")
    assert "an integer (above 0), in steps; must be given" in told("training.batch_ramp.steps")[1]


def test_for_programs(told):
    code, out, _ = told("training.steps", "--json")
    assert code == 0 and json.loads(out) == {
        "sections": {"training": "How long, in what batches and numbers, and towards what."},
        "keys": [{"name": "training.steps", "type": "an integer (above 0)", "default": 100, "required": False, "unit": "steps",
                  "meaning": "optimizer steps of the whole run"}]}
    everything = json.loads(told("--json")[1])["keys"]
    assert {key["name"] for key in everything} >= {"run.name", "schedule.costs.hop", "model.rope_scaling.factor"}


@pytest.mark.parametrize("arguments, line", [
    (["run.sed"], "KEY = run.sed: no key or section; near it: run.seed"),
    (["run.seed", "--markdown"], "python -m jobs.config: KEY = run.seed: nothing, with --markdown"),
    (["run.seed", "--file"], "python -m jobs.config: KEY = run.seed: nothing, with --file"),
    (["--file", "configs/none.yaml"], "--file = configs/none.yaml: one of configs/deepseek_v3.yaml, ")])
def test_refusals(told, arguments, line):
    code, out, err = told(*arguments)
    assert (code, out) == (2, "") and err.startswith(line) and len(err.splitlines()) == 1


def test_files_that_come_along(told):
    names = told("--file")[1].split()
    assert {"configs/tiny.yaml", "cluster/rayjob.yaml", "dashboards/prometheus.yml", "dashboards/grafana/overview.json"
            } <= set(names)
    for name in names:
        path = told("--file", name)[1].removesuffix("\n")
        assert os.path.isabs(path) and os.path.isfile(path) and path.endswith(f"/{name}")


def test_where_a_configuration_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = str(REPOSITORY / "jobs" / "configs" / "tiny.yaml")
    assert packaged.configuration_file("tiny") == packaged.configuration_file("tiny.yaml") == tiny
    (tmp_path / "tiny").mkdir()
    assert packaged.configuration_file("tiny") == tiny  # a folder is no configuration
    (tmp_path / "tiny.yaml").write_text("run: {name: own}\n")
    assert packaged.configuration_file("tiny.yaml") == "tiny.yaml"
    with pytest.raises(cli.ConfigError) as caught:
        packaged.configuration_file("sub/tiny")
    assert str(caught.value) == ("--config = sub/tiny: a readable YAML file (No such file or directory), or the name of a "
                                 "configuration that comes along: deepseek_v3, moe_16b, tiny")


def test_a_job_takes_a_configuration_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = cli.Parser(prog="job")
    cli.arguments(parser)
    assert cli.configuration(parser.parse_args(["--config", "moe_16b"])).run.name == "moe-16b"
    assert cli.configuration(parser.parse_args([])) == RunConfig()
