"""A short run to which several things happen at once: it goes on, nothing of it is lost, and nobody else is. Needs root, like
what it strikes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from actors.files.run_folder import RunFolder
from jobs import audit
from jobs.benches.chaos.processes import KINDS, Processes, processes
from jobs.benches.chaos.text import undisturbed
from tests.cluster import eventually

COMPARED = 12
SECONDS = 120.0
"""What a busy host may take until all are back."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def expected(folder):
    return [step["loss"] for step in undisturbed(folder, COMPARED)]


def test_strikes_at_once(folder, expected):
    """A node is killed while another one stalls; before it is back the disk is full and another rank raises, and a coordinator
    takes over in between."""
    chance = random.Random(1)
    with processes(folder) as begin:
        company = begin("short")
        nodes = company.nodes()
        company.strike("node killed", nodes[:1], chance)
        company.strike("node stalled", nodes[1:2], chance)
        company.strike("storage full", [], chance)
        company.strike("coordinator replaced", [], chance)
        company.strike("rank raises", nodes[2:3], chance)
        assert set(company.nodes()).isdisjoint(nodes[:3])
        eventually(company.whole, SECONDS, "all are back")
        struck, pids = {nodes[0], nodes[2]}, [pid for node in nodes for pid in company.processes(node)]
        company.stop()
        assert len(company.nodes()) == len(nodes)
        found = RunFolder(str(company.folder.parent), "short")
        lines, events = found.ledger_lines(), found.events()
        assert not audit.audit(str(company.folder), company.config, company.dataset).problems
    assert [line["step"] for line in lines] == list(range(len(lines)))
    ours = [line["loss"] for line in lines[:COMPARED]]
    assert ours == pytest.approx(expected[: len(ours)], rel=1e-9) and len(ours) > 3
    lost = [member for told in events if told.name == "lost" for member in told.event.members]
    assert lost and {member.split("/")[0] for member in lost} <= struck
    assert [told for told in events if told.name == "coordinator_restarted"]
    assert len(pids) == len(nodes) and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert (company.folder / "ledger.jsonl").exists() and not company.folder.is_mount()


def test_every_kind_can_be_done():
    assert all(callable(getattr(Processes, "_" + kind.replace(" ", "_"))) for kind in KINDS)
