"""Names of a run's actors, by which whoever comes later finds them again: its coordinators, its ranks.

A run is named after its folder, so that runs of the same name in different folders do not meet.
"""

from __future__ import annotations

import hashlib

from orchestrator.protocol.members import Member

NAMESPACE = "dualray"
_BETWEEN = "|"  # which no run's name has
_COORDINATOR, _RANK = "coordinator", "rank"


def run_of(folder: str) -> str:
    """What the actors of the run in a folder begin with."""
    path = folder.rstrip("/")
    return f"{path.rpartition('/')[2]}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def of_coordinator(run: str, epoch: int) -> str:
    """epoch: counts coordinators of the run."""
    return _BETWEEN.join((run, _COORDINATOR, str(epoch)))


def of_rank(run: str, member: Member) -> str:
    return _BETWEEN.join((run, _RANK, member.node, str(member.local), str(member.incarnation)))


def meaning(name: str, run: str) -> int | Member | None:
    """Of an actor's name: the epoch of a coordinator of this run, one of its ranks, or something else."""
    match name.split(_BETWEEN):
        case [before, kind, epoch] if before == run and kind == _COORDINATOR and epoch.isdigit():
            return int(epoch)
        case [before, kind, node, local, incarnation] if before == run and kind == _RANK and (local + incarnation).isdigit():
            return Member(node, int(local), int(incarnation))
    return None
