"""The run as its coordinator shows it: asked for over HTTP, at the address that the run has left in its folder."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from typing import Any

from actors.files import storage
from actors.files.names import run_of
from actors.files.run_folder import LIVE, RunFolder
from actors.hosts.auth_token import NoToken, wanted_token

_ANSWER_SECONDS, _AGAIN_SECONDS = 3.0, 5.0
_MOST_NODES = 32
"""A terminal has no room for more."""


class PublishedAddress:
    """Where a run can be asked, in its folder. No run ends for want of that: storage that does not take it is offered it
    again, and what it does not delete is an address where nobody answers.

    ray: the cluster's address. local: whether that is in this process only.
    """

    def __init__(self, folder: RunFolder, ray: str, local: bool):
        self._folder, self._about = folder, {"actors": run_of(folder.path), "ray": ray, "local": local}
        self._written, self._again_at = "", 0.0

    def __call__(self, address: str) -> None:
        if address == self._written or time.monotonic() < self._again_at:
            return
        try:
            self._folder.write(LIVE, json.dumps({"address": address} | self._about))
            self._written = address
        except storage.StorageError:
            self._again_at = time.monotonic() + _AGAIN_SECONDS

    def withdraw(self) -> None:
        with contextlib.suppress(storage.StorageError):
            storage.delete(storage.join(self._folder.path, LIVE))


def ask(folder: str) -> dict[str, Any] | None:
    """What the page shows; None: nobody answers, or it is another run that does."""
    path = storage.join(folder, LIVE)
    if not storage.exists(path):
        return None
    try:
        url = f"http://{json.loads(storage.read_bytes(path))['address']}/status.json"
        found = _get(url)
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and found.get("run") == folder.rstrip("/").rpartition("/")[2] else None


def _get(url: str) -> Any:
    """Shows Ray's token where it is asked for, there and here: whoever can write the run's folder can name any address. Raises OSError,
    ValueError."""
    request = urllib.request.Request(url)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        if refused.code != HTTPStatus.UNAUTHORIZED or (token := _token()) is None:
            raise
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
        return json.loads(answer.read())


def _token() -> str | None:
    try:
        return wanted_token()
    except NoToken:
        return None


def lines(state: dict[str, Any]) -> list[str]:
    """For people: how it goes, who is there, where the time went, what happened."""
    newest, found = state["newest"], []
    if state["waiting"]:
        found.append(f"waiting      {state['waiting']}")
    if newest:
        utilisation = "" if newest.get("mfu") is None else f"MFU {newest['mfu']:.1%}  "
        found.append(f"now          step {newest['step'] + 1} of {state['steps']}  loss {newest['loss']:.4f}  {newest['tokens_per_second']:,.0f} tokens/s"
                     f"  {utilisation}overlap {newest['overlap_ratio']:.0%}  bubble {newest['bubble_ratio']:.0%}, {state['now'] - newest['time']:.0f} s ago")
    if state["goodput"] is not None:
        total = sum(state["spent"].values())
        rest = sorted(((seconds / total, kind) for kind, seconds in state["spent"].items() if kind != "useful"), reverse=True)
        lost = ", ".join(f"{kind.replace('_', ' ')} {share:.1%}" for share, kind in rest if share >= 0.001)
        found.append(f"goodput      {state['goodput']:.1%} of {total:,.0f} s trained; {lost}")
    found += _grid(state)
    for event in state["events"][-5:]:
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
        found.append(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}     {event['event']}: {details}"[:160])
    return found


def _grid(state: dict[str, Any]) -> list[str]:
    """A node a line, a rank a cell: its number, its stages, and how slow it is. Of many nodes, only those with a slow rank."""
    width = max((len(row["node"]) for row in state["grid"]), default=0)
    found, shown = [], state["grid"]
    if len(shown) > _MOST_NODES:
        shown = [row for row in shown if any(rank["slow"] for rank in row["ranks"])][:_MOST_NODES]
        found.append(f"{len(state['grid'])} nodes with {sum(len(row['ranks']) for row in state['grid'])} ranks; with a slow rank: "
                     f"{len(shown) or 'none'}")
    for row in shown:
        cells = []
        for rank in row["ranks"]:
            stages, slow = "+".join(map(str, rank["stages"])), f" {rank['slow']:g}x slow" if rank["slow"] else ""
            cells.append(f"[{rank['rank']}: stage {stages}{slow}]")
        found.append(f"{row['node'][:24]:<{min(width, 24)}}  {' '.join(cells)}")
    return found + [f"{lost['node'][:24]:<{min(width, 24)}}  lost {lost['seconds_ago']:.0f} s ago" for lost in state["lost"]]
