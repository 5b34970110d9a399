"""`python -m jobs.stop RUN [--now]`: ask a run that is under way to save and end, whether its driver lives or not, from any host
of its cluster; returns when it has ended. `--now`: without a save. RUN is a run's folder, a path or a URI, or its name.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from actors.calls.messages import Failure, Outcome
from actors.errors import first_line
from actors.files import storage
from actors.files.run_folder import LIVE, RunFolder
from actors.state import checkpoint
from jobs import cli, status
from jobs.driver import session
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.protocol.events import Ending

ENDED_AT_ONCE = "ended at once by jobs.stop --now; the same command continues from the newest checkpoint"
_ANSWER_SECONDS, _LOOK_SECONDS = 30.0, 0.2
_END_SECONDS = 15.0
"""How long a driver may take to notice that its run has ended, and to clear up; and another coordinator to come."""


def main() -> int:
    """Raises JobFailed: no such run is under way, or it does not end."""
    parser = cli.Parser(prog=cli.program("stop"), description="Ask a run that is under way to save and end; returns when it has.",
                        examples=("tiny", "/shared/runs/tiny --now"))
    parser.add_argument("folder", metavar="RUN", help="a run's folder, a path or a URI, or its name")
    parser.add_argument("--now", action="store_true", help="end it at once, without a save")
    cli.arguments(parser)
    options = parser.parse_args()
    try:
        options.folder = status.named(options)
        live, config = _live(options.folder), _configuration(options)
        _connect(options.folder, live)
        print(stop(options.folder, str(live["actors"]), config, options.now))
    except storage.StorageError as error:
        raise cli.JobFailed(str(error)) from error
    finally:
        session.disconnect()
    return cli.DONE


def stop(folder: str, actors: str, config: RunConfig, now: bool) -> str:
    """What has come of it, in one line. actors: what the names of the run's begin with. Raises JobFailed."""
    from actors.hosts.cluster import end_actors

    deadline = time.monotonic() + config.training.step_timeout_seconds + config.elastic.storage_seconds
    found: Outcome | Failure | None = None
    if not _anybody(actors):
        raise cli.JobFailed(f"{folder}: no run is under way there")
    while found is None and (coordinator := _coordinator(actors)) is not None:
        found = _ended(coordinator, now, deadline)
    if found is None and not _anybody(actors):
        return _left(folder)
    _await_driver(actors)
    if not end_actors(actors, _END_SECONDS):
        raise cli.JobFailed(f"{folder}: actors of this run do not end")
    if found is None:
        return f"ended: ranks without a coordinator; {_left(folder)}"
    if isinstance(found, Failure):
        if found.ending is Ending.STOPPED:  # by `give_up`
            return _left(folder)
        raise cli.JobFailed(f"the run has ended: {found.reason}")
    if not found.interrupted:
        return f"the run has done all of its {found.step} steps"
    return _left(folder) if not found.saved else f"stopped: saved after step {found.step}"


def _configuration(options: Namespace) -> RunConfig:
    """The run's; the defaults where storage has not taken it, for only bounds are wanted of it. Raises ConfigError."""
    try:
        return status.configuration(options)
    except storage.StorageError:
        return parse({}, options.overrides)


def _live(folder: str) -> Mapping[str, Any]:
    """What the run says of itself. Raises JobFailed: no run is under way here."""
    path = storage.join(folder, LIVE)
    try:
        found = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not {"ray", "actors"} <= found.keys():
        raise cli.JobFailed(f"{folder}: no run is under way there; it has no {LIVE}")
    return found


def _connect(folder: str, live: Mapping[str, Any]) -> None:
    """To the cluster of the run. Raises JobFailed: it cannot be reached."""
    if live.get("local"):
        os.environ["RAY_AUTH_MODE"] = "disabled"
    if live.get("local") or not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ADDRESS"] = str(live["ray"])
    try:
        session.connect()
    except (cli.JobFailed, ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ["RAY_ADDRESS"]
        raise cli.JobFailed(f"{folder}: its Ray at {address} cannot be reached from this host ({first_line(error)})") from None


def _coordinator(actors: str) -> Any | None:
    """The newest. Where there are only ranks, one may be on its way."""
    from actors.hosts.cluster import named_actors

    deadline = time.monotonic() + _END_SECONDS
    while True:
        coordinators, ranks = named_actors(actors)
        if coordinators:
            return coordinators[max(coordinators)]
        if not ranks or time.monotonic() > deadline:
            return None
        time.sleep(_LOOK_SECONDS)


def _ended(coordinator: Any, now: bool, deadline: float) -> Outcome | Failure | None:
    """How the run ended; None: the coordinator has. Raises JobFailed: it takes too long."""
    import ray

    try:
        ray.get(coordinator.give_up.remote(ENDED_AT_ONCE) if now else coordinator.stop.remote(), timeout=_ANSWER_SECONDS)
        while (found := ray.get(coordinator.outcome.remote(_LOOK_SECONDS), timeout=_ANSWER_SECONDS)) is None:
            if time.monotonic() > deadline:
                raise cli.JobFailed("the run was asked to stop, and has not ended so far; --now ends it without a save")
        return found
    except ray.exceptions.RayActorError:
        return None
    except ray.exceptions.GetTimeoutError:
        if now:
            ray.kill(coordinator)
            return None
        raise cli.JobFailed(f"the coordinator has not answered for {_ANSWER_SECONDS:g} s") from None


def _anybody(actors: str) -> bool:
    from actors.hosts.cluster import named_actors

    return any(named_actors(actors))


def _await_driver(actors: str) -> None:
    """If there is one, it learns of the end, and ends what is left."""
    deadline = time.monotonic() + _END_SECONDS
    while _anybody(actors) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _left(folder: str) -> str:
    """What the files say of a run that has ended."""
    directory, _, name = (folder if "://" in folder else os.path.abspath(folder)).rstrip("/").rpartition("/")
    found = RunFolder(directory, name)
    committed = found.ledger().committed
    saved = next(filter(None, map(_saved, reversed(checkpoint.complete(found.checkpoints)))), 0)
    return f"stopped: saved after step {saved}" + ("" if saved == committed else f"; {committed} were done")


def _saved(path: str) -> int | None:
    """The step of a checkpoint that can be read."""
    try:
        return checkpoint.read_manifest(path).step
    except checkpoint.CheckpointError:
        return None


if __name__ == "__main__":
    sys.exit(cli.run(main))
