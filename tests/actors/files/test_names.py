"""Names by which a run's actors are found again."""

from __future__ import annotations

import pytest

from actors.files.names import meaning, of_coordinator, of_rank, run_of
from orchestrator.protocol.members import Member

RUN = run_of("/shared/runs/tiny")


@pytest.mark.parametrize("name, what", [
    (of_coordinator(RUN, 3), 3),
    (of_rank(RUN, Member("node-1", 0, 2)), Member("node-1", 0, 2)),
    (of_coordinator(run_of("/shared/runs/tiny2"), 3), None),
    (of_rank(run_of("/others/runs/tiny"), Member("node-1", 0)), None),
    (f"{RUN}|coordinator|first", None),
    (f"{RUN}|rank|node-1|0", None),
    (f"{RUN}|feed|1", None),
    (RUN, None),
    ("", None),
])
def test_what_is_named_is_found_and_nothing_else(name, what):
    assert meaning(name, RUN) == what


def test_a_run_is_the_same_however_its_folder_is_written_and_differs_from_those_of_other_folders():
    assert run_of("/shared/runs/tiny/") == RUN and RUN.startswith("tiny-")
    assert len({run_of(folder) for folder in ("/shared/runs/tiny", "/shared/tiny", "s3://bucket/runs/tiny", "/shared/runs/other")}) == 4
