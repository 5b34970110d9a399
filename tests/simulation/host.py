"""A node of the simulated cluster."""

from __future__ import annotations

from tests.simulation.settings import SILENCE


class Host:
    """A node. up: it runs. present: the cluster has it. draining: it is to go. lost_at: when the last process on it ended. told_at:
    when the newest word of the cluster on it reaches the coordinator."""

    __slots__ = ("births", "draining", "lost_at", "name", "present", "ranks", "told_at", "up")

    def __init__(self, name: str, ranks: int):
        self.name, self.ranks, self.up, self.present, self.draining = name, ranks, True, True, False
        self.lost_at = -SILENCE
        self.told_at = 0.0
        self.births: list[str] = []  # what befalls the next processes that are made here
