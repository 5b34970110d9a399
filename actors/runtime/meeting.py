"""Where the ranks of a new generation meet."""

from __future__ import annotations

import datetime

import torch.distributed as dist

from actors.comm.groups import CREATE_TIMEOUT_SECONDS, Aborted


class MeetingPlace:
    """A store, connected to once: torch looks up the names of both ends, and DNS may take seconds."""

    def __init__(self) -> None:
        self._found: tuple[tuple[str, int], dist.Store] | None = None

    def at(self, address: tuple[str, int]) -> dist.Store:
        """The store at (host, port). Raises Aborted: nobody is there."""
        host, port = address
        try:
            if self._found is None or self._found[0] != address or not _answers(self._found[1]):
                self._found = address, dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                                                     timeout=datetime.timedelta(seconds=CREATE_TIMEOUT_SECONDS))
        except RuntimeError as error:
            raise Aborted(f"no store at {host}:{port}") from error
        return self._found[1]


def _answers(store: dist.Store) -> bool:
    try:
        return store.num_keys() >= 0
    except RuntimeError:  # its server is gone; another one may have the same address
        return False
