"""The table of kinds: what it takes is right at any size, what it does not take is refused in one line."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import parse_csv, to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
from orchestrator.schedule.kinds.registry import (
    KINDS,
    NAMES,
    TABLE,
    documented,
    generate,
    has_chosen_placement,
    smallest_microbatches,
    stages_of,
)

ROOT = Path(__file__).parents[4]
FREE = tuple(kind for kind in KINDS if TABLE[kind].chunks is None)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), positions=st.integers(1, 7), wanted=st.integers(1, 16), chunks=st.integers(1, 4))
def test_every_kind_is_right_at_any_size(kind, positions, wanted, chunks):
    positions += not TABLE[kind].takes(positions)
    chunks = chunks if kind in FREE else None
    microbatches = smallest_microbatches(kind, positions, wanted, chunks)
    schedule = generate(kind, positions, microbatches, chunks)
    check(schedule, lower(schedule))
    assert (schedule.kind, schedule.microbatches) == (kind, microbatches)
    assert schedule.stages == stages_of(kind, positions, chunks)
    assert parse_csv(to_csv(schedule), kind, schedule.stages) == schedule


def test_names():
    assert set(KINDS) == {"dualpipe", "dualpipev", "zb_h1", "zbv", "1f1b", "interleaved_1f1b", "merged_interleaved_1f1b", "gpipe"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [1, 2, 4])
def test_smallest_number_of_microbatches_is_what_search_finds(kind, positions):
    def taken(microbatches: int) -> bool:
        try:
            return bool(generate(kind, positions, microbatches))
        except ConfigError:
            return False

    for wanted in range(-1, 20, 3):
        assert smallest_microbatches(kind, positions, wanted) == next(m for m in range(wanted, 40) if taken(m))


@pytest.mark.parametrize("kind, chunks, stages", [
    ("dualpipe", None, Stages(BOTH, 4)), ("dualpipev", 2, Stages(V, 4, 2)), ("zbv", None, Stages(V, 4, 2)),
    ("zb_h1", 1, Stages(LOOP, 4)), ("1f1b", None, Stages(LOOP, 4)), ("gpipe", None, Stages(LOOP, 4)),
    ("interleaved_1f1b", None, Stages(LOOP, 4, 2)), ("merged_interleaved_1f1b", 3, Stages(LOOP, 4, 3)),
    ("searched", None, Stages(BOTH, 4)),
])
def test_stages_of_a_kind(kind, chunks, stages):
    assert stages_of(kind, 4, chunks) == stages
    assert TABLE[kind].chunks in (None, stages.chunks) and TABLE[kind].fits(stages)


def test_placement_is_free_where_the_kind_is_searched_for():
    assert stages_of("searched", 4, placement="v") == Stages(V, 4, 2)
    assert stages_of("searched", 3) == Stages(LOOP, 3) and stages_of("searched", 1) == Stages(BOTH, 1)
    assert [kind for kind in NAMES if has_chosen_placement(kind)] == ["searched"]
    assert not has_chosen_placement("forward_only")


@pytest.mark.parametrize("arguments, message", [
    (("zigzag", 2), f"kind = zigzag: one of {', '.join(KINDS)}, searched"),
    (("zbv", 2, 4), "chunks = 4: zbv takes 2"),
    (("1f1b", 2, 1, "v"), "placement = v: 1f1b takes loop"),
    (("searched", 2, None, "ring"), "placement = ring: one of both, v, loop"),
    (("searched", 3, None, "both"), "positions = 3: searched takes 1 or an even number with placement both"),
    (("searched", 2, 3, "v"), "chunks = 3: an even number with placement v"),
])
def test_stages_that_no_kind_has(arguments, message):
    with pytest.raises(ConfigError) as refusal:
        stages_of(*arguments)
    assert str(refusal.value) == message


@pytest.mark.parametrize("stages, fitting", [
    (Stages(BOTH, 4), {"dualpipe", "searched"}),
    (Stages(BOTH, 3), set()),
    (Stages(V, 3, 2), {"dualpipev", "zbv", "searched"}),
    (Stages(V, 3, 4), {"searched"}),
    (Stages(LOOP, 3), set(NAMES) - {"dualpipe", "dualpipev", "zbv"}),
    (Stages(LOOP, 3, 2), {"interleaved_1f1b", "merged_interleaved_1f1b", "searched"}),
])
def test_kinds_that_may_have_their_stages_there(stages, fitting):
    assert {name for name, kind in TABLE.items() if kind.fits(stages)} == fitting


def test_chunks():
    assert generate("interleaved_1f1b", 2, 4) == generate("interleaved_1f1b", 2, 4, 2)
    assert generate("zbv", 2, 4) == generate("zbv", 2, 4, 2)
    assert generate("merged_interleaved_1f1b", 2, 4, 3).stages.count == 6


@pytest.mark.parametrize("arguments, message", [
    (("zigzag", 2, 4), f"kind = zigzag: one of {', '.join(KINDS)}"),
    (("dualpipe", 3, 8), "positions = 3: dualpipe takes 1 or an even number"),
    (("zbv", 0, 8), "positions = 0: zbv takes at least 1"),
    (("gpipe", 2, 0), "microbatches = 0: gpipe takes at least 1"),
    (("1f1b", 2, 4, 2), "chunks = 2: 1f1b takes 1"),
    (("dualpipev", 2, 4, 4), "chunks = 4: dualpipev takes 2"),
    (("merged_interleaved_1f1b", 2, 4, 0), "chunks = 0: at least 1 with placement loop"),
])
def test_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as refusal:
        generate(*arguments)
    assert str(refusal.value) == message


@pytest.mark.parametrize("arguments, key", [
    (("zigzag", 2, 4), "kind"), (("dualpipe", 3, 8), "positions"), (("1f1b", -1, 8), "positions"), (("zbv", 2, 4, 3), "chunks"),
])
def test_no_smallest_number_for_what_is_refused(arguments, key):
    with pytest.raises(ConfigError) as refusal:
        smallest_microbatches(*arguments)
    assert refusal.value.key == key


def test_the_documents_have_the_table():
    assert "\n".join(["", "", *documented(), "", ""]) in (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sentence = readme[readme.index("`schedule.kind` is ") + len("`schedule.kind` is ") :].partition(";")[0]
    assert re.findall("`([a-z0-9_]+)`", sentence) == [*NAMES]


def test_what_the_table_says_of_a_kind_in_words():
    assert documented()[2] == ("| `dualpipe` | 2 (a stage and its mirror) | DeepSeek-V3's: microbatches enter at both ends; "
                               "steady state of pairs F\\|B |")
    assert [TABLE[kind].hosted for kind in ("zbv", "gpipe", "interleaved_1f1b", "searched")] == [
        "2 (legs of a V)", "1", "`schedule.chunks`", "any of these placements"]


def test_a_kind_that_torch_has_too_is_called_by_its_class_there():
    torch = import_module("torch.distributed.pipelining.schedules")
    found = [kind.torch for kind in TABLE.values() if kind.torch]
    assert len(found) == len(set(found)) == 5 and all(hasattr(torch, name) for name in found)
