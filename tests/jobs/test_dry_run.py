"""The dry run and `jobs.plan` lower and check what they announce; and a kind that one entry adds to the table is there for both.

Commands are real, in a copy of the tree whose table of kinds has two entries more.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--set", "topology.virtual_nodes=2", "--set", "topology.ranks_per_node=1")
DRY = ("train", "--dry-run", *SMALL)
ENTRIES = '''TABLE = table((
    ScheduleKind(
        name="zigzag", meaning="what a newcomer has just added", stage_placement=LOOP, chunks=1, generator=gpipe,
        fewest_microbatches=lambda positions: 3 * positions, instead=_ANY_PIPELINE, predicts_searched=False, torch=None),
    ScheduleKind(
        name="stuck", meaning="each end begins with what the other has last", stage_placement=LOOP, chunks=1,
        generator=lambda stages, microbatches: tuple(
            tuple(Compute(kind, position, 0, microbatch) for microbatch in list(range(microbatches))[::-1 if position else 1]
                  for kind in (ActionKind.FORWARD, ActionKind.BACKWARD)) for position in range(stages.positions)),
        fewest_microbatches=_two_each, instead=_ANY_PIPELINE, predicts_searched=False, torch=None),
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, but for the table of kinds as it is."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("actors", "jobs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "orchestrator", folder / "orchestrator", ignore=shutil.ignore_patterns("__pycache__"))
    registry = folder / "orchestrator" / "schedule" / "kinds" / "registry.py"
    text = registry.read_text(encoding="utf-8")
    assert text.count("TABLE = table((\n") == 1
    text = text.replace("TABLE = table((\n", ENTRIES).replace("import Schedule\n", "import ActionKind, Compute, Schedule\n")
    registry.write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, job: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"jobs.{job}", *words], cwd=folder, capture_output=True, text=True, timeout=600,
                          check=False)


def test_one_entry_makes_a_kind_usable(tree):
    dry = run(tree, *DRY, "--set", "schedule.kind=zigzag")
    assert dry.returncode == 0, dry.stderr
    assert ("schedule     zigzag\nprograms     lowered and checked for 16 microbatches: complete, in order, free of deadlock\n"
            in dry.stdout)
    planned = run(tree, "plan", "schedule", "--kind", "zigzag", "--ranks", "4", "--format", "json")
    assert planned.returncode == 0, planned.stderr
    shown = json.loads(planned.stdout)
    assert (shown["kind"], shown["microbatches"], shown["makespan"]) == ("zigzag", 12, (12 + 3) * 3)
    few = run(tree, "plan", "schedule", "--kind", "zigzag", "--ranks", "4", "--microbatches", "8")
    assert (few.returncode, few.stderr) == (2, "--microbatches = 8: zigzag takes at least 12 (3 x positions)\n")
    helped = run(tree, "plan", "schedule", "--help")
    assert "zigzag (what a newcomer has just added)" in " ".join(helped.stdout.split())


@pytest.mark.parametrize("words, key, microbatches", [
    ((*DRY, "--set", "schedule.kind=stuck"), "schedule.kind", 16),
    (("plan", "schedule", "--kind", "stuck", "--ranks", "2", "--microbatches", "8"), "--kind", 8),
])
def test_a_schedule_that_would_not_run_is_refused_in_one_line(tree, words, key, microbatches):
    done = run(tree, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"{key} = stuck: a kind whose schedule runs with {microbatches} microbatches on 2 positions "
                           f"(deadlock: position 0 at B0.0; position 1 at F0.{microbatches - 1})\n")


def test_a_search_that_takes_too_long_is_given_up_and_said_so():
    dry = run(ROOT, *DRY, "--set", "schedule.kind=searched", "--check-seconds", "0.01")
    assert dry.returncode == 0, dry.stderr
    assert "programs     not checked for 16 microbatches, since the time for it ran out; " in dry.stdout
    assert "memory       position 0" in dry.stdout


def test_a_search_that_ends_in_time_is_checked():
    dry = run(ROOT, *DRY, "--set", "schedule.kind=searched", "--set", "training.batch_sequences=8", "--check-seconds", "600")
    assert dry.returncode == 0, dry.stderr
    assert "schedule     searched, placement both\nprograms     lowered and checked for 2 microbatches" in dry.stdout


@pytest.mark.parametrize("seconds", ["0", "nan"])
def test_a_bound_that_is_none(seconds):
    done = run(ROOT, *DRY, "--check-seconds", seconds)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("--check-seconds = ") and done.stderr.endswith(": above 0, at most 86400\n")
