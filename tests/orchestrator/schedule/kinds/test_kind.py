"""A kind that is half registered: nothing that uses it can be imported, and the refusal says what is missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from orchestrator.schedule.kinds.kind import IncompleteKind, ScheduleKind
from orchestrator.schedule.kinds.registry import TABLE, table

WHOLE = {field.name: getattr(TABLE["1f1b"], field.name) for field in fields(ScheduleKind)} | {"name": "zigzag"}
IMPORTED_WITHOUT = """
import sys
from orchestrator.schedule.kinds import kind
whole = kind.ScheduleKind
def half(**given):
    given.pop(sys.argv[1]) if given["name"] == "gpipe" else None
    return whole(**given)
kind.ScheduleKind = half
import orchestrator.config.run_config
"""


def test_a_whole_one():
    assert table((*TABLE.values(), ScheduleKind(**WHOLE)))["zigzag"].name == "zigzag"


@pytest.mark.parametrize("missing", sorted(WHOLE.keys() - {"name"}))
def test_nothing_may_be_missing(missing):
    with pytest.raises(IncompleteKind) as refusal:
        ScheduleKind(**{name: value for name, value in WHOLE.items() if name != missing})
    assert str(refusal.value) == f"schedule kind zigzag: no {missing}"


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(IncompleteKind) as refusal:
        ScheduleKind(name="zigzag", meaning="to and fro", stage_placement="v", chunks=2)
    assert str(refusal.value) == ("schedule kind zigzag: no fewest_microbatches, no generator, no instead, "
                                  "no predicts_searched, no torch")
    with pytest.raises(IncompleteKind, match="^schedule kind without a name: no name$"):
        ScheduleKind(**{name: value for name, value in WHOLE.items() if name != "name"})


@pytest.mark.parametrize("wrong", [
    {"name": "zig zag"}, {"name": ""}, {"meaning": " "}, {"meaning": "two\nlines"}, {"stage_placement": "ring"}, {"chunks": 0},
    {"chunks": 3, "stage_placement": "v"}, {"chunks": 2, "stage_placement": "both"}, {"chunks": 1, "stage_placement": None},
    {"fewest_microbatches": 4}, {"generator": "zigzag"}, {"instead": "1f1b"}, {"predicts_searched": None}, {"torch": 7},
])
def test_nothing_may_be_of_the_wrong_sort(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(IncompleteKind) as refusal:
        ScheduleKind(**{**WHOLE, **wrong})
    assert str(refusal.value) == f"schedule kind {value if name == 'name' else 'zigzag'}: {name} = {value!r} is none"


@pytest.mark.parametrize("wrong, message", [
    ({"name": "gpipe"}, "schedule kind gpipe: there is another of this name"),
    ({"instead": ("1f1b", "nowhere")}, "schedule kind zigzag: instead = ('1f1b', 'nowhere') has 'nowhere', "
                                       "which is no kind with a generator"),
    ({"instead": ("searched",)}, "schedule kind zigzag: instead = ('searched',) has 'searched', "
                                 "which is no kind with a generator"),
])
def test_kinds_that_do_not_go_together(wrong, message):
    with pytest.raises(IncompleteKind) as refusal:
        table((*TABLE.values(), replace(ScheduleKind(**WHOLE), **wrong)))
    assert str(refusal.value) == message


@pytest.mark.parametrize("missing", ["generator", "stage_placement"])
def test_the_configuration_cannot_be_imported_with_half_a_kind(missing):
    done = subprocess.run([sys.executable, "-c", IMPORTED_WITHOUT, missing], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"orchestrator.schedule.kinds.kind.IncompleteKind: schedule kind gpipe: no {missing}"
