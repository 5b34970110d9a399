"""What there is of a checkpoint in the simulated run folder."""

from __future__ import annotations


class Checkpoint:
    """pieces: history by generation and key, as their files are named. manifest: the content that it lists, once it counts.
    epoch: of the coordinator that wrote it. damaged: of its pieces; unreadable: the manifest itself. unlisted: a look into the
    folder does not show it."""

    __slots__ = ("damaged", "directory", "epoch", "manifest", "pieces", "step", "unlisted", "unreadable")

    def __init__(self, directory: str):
        self.directory, self.step, self.epoch = directory, 0, 0
        self.pieces: dict[tuple[int, int], int] = {}
        self.manifest: dict[int, int] | None = None
        self.damaged = self.unreadable = self.unlisted = False
