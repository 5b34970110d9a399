"""`jobs.plan` as a user runs it, and what jobs share on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jobs.cli import JobFailed, Parser, UsageError, arguments, configuration, run
from jobs.plan import main
from orchestrator.config import ConfigError

ROOT = Path(__file__).parents[2]


def plan(*words):
    return subprocess.run([sys.executable, "-m", "jobs.plan", *words], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)


def test_csv():
    done = plan("schedule", "--kind", "dualpipe", "--ranks", "2", "--microbatches", "4", "--format", "csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("F0.0,F1.0,F0.1,B1.0,F1.1|B0.0,B1.1,I0.1,W0.1\n"
                           "F1.0,F0.0,F1.1,B0.0,F0.1|B1.0,B0.1,I1.1,W1.1\n")


def test_refusal():
    done = plan("schedule", "--ranks", "3", "--microbatches", "8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--ranks = 3: dualpipe takes 1 or an even number\n"


@pytest.mark.parametrize("words, line", [
    (["schedule", "--kind", "zigzag"], "--kind = zigzag: one of dualpipe, forward_only"),
    (["schedule", "--ranks", "0"], "--ranks = 0: dualpipe takes 1 or an even number"),
    (["schedule", "--ranks", "4", "--microbatches", "9"],
     "--microbatches = 9: dualpipe takes an even number, at least 8 (2 x positions)"),
    (["schedule", "--ranks", "four"], "python -m jobs.plan schedule: argument --ranks: invalid int value: 'four'"),
    (["schedule", "--set", "layout.pipline=2"], "layout.pipline = 2: unknown key; allowed here: pipeline, "),
    (["schedule", "--form", "csv"], "python -m jobs.plan: unrecognized arguments: --form csv"),
    (["schedule", "--config", "/no/such.yaml"], "--config = /no/such.yaml: a readable YAML file (No such file or directory)"),
    ([], "python -m jobs.plan: the following arguments are required: SUBCOMMAND"),
])
def test_refused_in_one_line(words, line, capsys):
    assert run(lambda: main(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_defaults_are_the_configuration(capsys):
    assert run(lambda: main(["schedule", "--set", "layout.pipeline=4", "--format", "json"])) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["ranks"], shown["microbatches"], shown["makespan"]) == ("dualpipe", 4, 8, 26)


def test_output_file(tmp_path, capsys):
    path = tmp_path / "schedule.svg"
    assert run(lambda: main(["schedule", "--ranks", "4", "--format", "svg", "--output", str(path)])) == 0
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert run(lambda: main(["schedule", "--output", str(tmp_path / "no" / "file")])) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("cannot be written (No such file or directory)\n")


def test_a_reader_that_goes_away_ends_the_job_quietly():
    with subprocess.Popen([sys.executable, "-m", "jobs.plan", "schedule"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 1)


@pytest.mark.parametrize("error, code, line", [
    (ConfigError("a.b", 3, "at most 2"), 2, "a.b = 3: at most 2\n"),
    (UsageError("no such job"), 2, "no such job\n"),
    (JobFailed("step 3 failed:\nrank 1 is gone"), 1, "step 3 failed: rank 1 is gone\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_exit_codes(error, code, line, capsys):
    def job():
        raise error

    assert run(job) == code
    assert capsys.readouterr().err == line


def test_what_nobody_foresaw_keeps_its_traceback():
    def job():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(job)
    assert run(lambda: None) == 0
    assert run(lambda: 1) == 1


def test_what_every_job_takes(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {steps: 7}\n")
    parser = Parser(prog="job")
    arguments(parser)
    options = parser.parse_args(["--config", str(tmp_path / "run.yaml"), "--set", "layout.pipeline=4", "--set", "run.seed=5"])
    config = configuration(options)
    assert (config.training.steps, config.layout.pipeline, config.run.seed) == (7, 4, 5)
