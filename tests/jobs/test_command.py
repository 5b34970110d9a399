"""`dualray JOB` is `python -m jobs.JOB`, imports that job only, and the help of each ends with examples that are right."""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli, command
from tests.cluster import REPOSITORY

IMPORTED = ("; print(*sorted({'torch', 'ray', 'pyarrow', 'pydantic', 'jobs.train', 'jobs.plan', 'jobs.config'} "
            "& sys.modules.keys()))")
WORDS = {"status": [["audit"]]}
"""Words after which a job has another parser, beside sub-commands, which argparse knows of."""


def jobs() -> list[str]:
    """All that `python -m jobs.NAME` starts."""
    return sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py") if '\nif __name__ == "__main__":' in path.read_text())


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    """What pip makes of the entry in pyproject.toml."""
    path = tmp_path_factory.mktemp("bin") / "dualray"
    path.write_text("import sys\nfrom jobs.command import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    return str(path)


def ran(*words: str, cwd: Path | str = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=cwd, env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, timeout=120, check=False)


def test_each_job_is_a_command_with_a_line():
    assert sorted(command.JOBS) == jobs()
    assert all(line and len(line) < 100 for line in command.JOBS.values())


@pytest.mark.parametrize("words, imported", [
    (["--help"], []), (["none"], []), (["config", "run.seed"], ["jobs.config", "pydantic"]),
    (["plan", "schedule", "--ranks", "2"], ["jobs.plan", "pydantic"])])
def test_only_the_job_that_is_asked_for_is_imported(words, imported):
    done = ran("-c", f"import sys; sys.argv[0] = 'dualray'; from jobs.command import main; main(){IMPORTED}", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == imported


def test_help_lists_all_commands_with_their_lines(script):
    done = ran(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, line in command.JOBS.items():
        assert [words for words in map(str.split, done.stdout.splitlines()) if words == [name, *line.split()]], name


@pytest.mark.parametrize("words, start", [
    (["trian"], "dualray: 'trian' is no command; there are "), ([], "dualray: which command? there are "),
    (["../x"], "dualray: '../x' is no command; "), (["cli"], "dualray: 'cli' is no command; ")])
def test_what_is_no_command_is_refused_in_one_line(script, words, start):
    done = ran(script, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(start) and done.stderr.endswith(f"{', '.join(command.JOBS)}\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("job, words, code", [
    ("config", ["run.seed"], 0), ("config", ["run.sed"], 2), ("plan", ["schedule", "--ranks", "4", "--microbatches", "8"], 0),
    ("plan", ["schedule", "--ranks", "four"], 2), ("plan", ["run", "none"], 2), ("config", ["--help"], 0),
    ("plan", ["run", "--help"], 0), ("status", ["--help"], 0)])
def test_both_ways_say_the_same(script, job, words, code):
    ours, theirs = ran(script, job, *words), ran("-m", f"jobs.{job}", *words)
    assert ours.returncode == theirs.returncode == code, (ours.stderr, theirs.stderr)

    def plain(printed: str) -> list[str]:  # a shorter name breaks lines elsewhere
        return " ".join(printed.split()).replace(f"python -m jobs.{job}", f"dualray {job}").split()

    assert plain(theirs.stdout) == ours.stdout.split() and plain(theirs.stderr) == ours.stderr.split()
    assert "python -m" not in ours.stdout + ours.stderr


class Parsed(Exception):
    """In the place of what a job does after it has read its arguments."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def parsed(monkeypatch, job: str, words: list[str]) -> argparse.ArgumentParser:
    """The job's own parser, which takes these words. Raises UsageError: it does not; SystemExit: after its help."""
    def stop(parser, *arguments, **options):
        argparse.ArgumentParser.parse_args(parser, *arguments, **options)
        raise Parsed(parser)

    with monkeypatch.context() as patched:
        patched.setattr(cli.Parser, "parse_args", stop)
        patched.setattr(sys, "argv", [f"jobs/{job}.py", *words])
        try:
            importlib.import_module(f"jobs.{job}").main()
        except Parsed as found:
            return found.parser
    raise AssertionError(f"{job} reads its arguments with another parser")


def examples(monkeypatch, capsys, job: str, words: list[str]) -> list[list[str]]:
    """Arguments of the examples that this help ends with."""
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, job, [*words, "--help"])
    assert ended.value.code == 0
    text, found, shown = capsys.readouterr().out.partition("\nexamples:\n")
    assert found, f"the help of {job} {words} has no examples"
    calls = [shlex.split(line) for line in shown.splitlines()]
    assert all(call[:3] == ["python", "-m", f"jobs.{job}"] and call[3 : 3 + len(words)] == words for call in calls)
    return [call[3:] for call in calls]


def checked(monkeypatch, capsys, job: str, words: list[str]) -> None:
    """This help, and that of each sub-command."""
    found = examples(monkeypatch, capsys, job, words)
    assert len(found) == 2 and found[0] != found[1]
    parser = [parsed(monkeypatch, job, call) for call in found][0]
    if not words:
        for action in parser._actions:
            for name in action.choices if isinstance(action, argparse._SubParsersAction) else ():
                checked(monkeypatch, capsys, job, [name])


@pytest.mark.parametrize("job", jobs())
def test_help_ends_with_two_examples_that_the_job_takes(monkeypatch, capsys, job):
    for words in [[], *WORDS.get(job, [])]:
        checked(monkeypatch, capsys, job, words)


@pytest.mark.parametrize("given, error", [
    ((), AssertionError), (("--json",), AssertionError), (("--json", "--jsno"), cli.UsageError), (("--json", ""), None)])
def test_a_job_without_two_examples_that_are_right_would_be_noticed(monkeypatch, capsys, given, error):
    class Job:
        @staticmethod
        def main():
            parser = cli.Parser(prog="python -m jobs.other", examples=given)
            parser.add_argument("--json", action="store_true")
            parser.parse_args()

    monkeypatch.setitem(sys.modules, "jobs.other", Job)
    if error is None:
        return checked(monkeypatch, capsys, "other", [])
    with pytest.raises(error):
        checked(monkeypatch, capsys, "other", [])
