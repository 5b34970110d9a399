"""What the driver of a run has left behind that died: a coordinator that goes on, or only ranks. Connected to Ray.

The same command started again takes it over, and nothing is read from storage. Whoever has the run's folder and is heard by its
coordinator is its driver.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from actors.calls.messages import Failure
from actors.files.names import run_of
from actors.files.run_folder import RunFolder
from jobs import cli
from jobs.driver.progress import Progress
from jobs.driver.running import POLL_SECONDS, START_TIMEOUT_SECONDS, Interrupt, RunActors, newest
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.protocol.members import Member
from orchestrator.recovery.replay import Replay

ANSWER_SECONDS = 10.0
_REFUSED_SECONDS = 5.0
"""How long it may take at most until a coordinator notices that its driver is silent, and accepts another one."""

_FREE = ("telemetry",)
_FREE_OF_RANKS = ("telemetry", "checkpoint", "elastic", "placement", "training.steps", "training.validate_every")
"""What may differ from before: of a run under way nothing but how it is watched, of its ranks what only a coordinator uses."""


def coordinator_of(folder: RunFolder) -> tuple[int, Any] | None:
    """Epoch and handle of the newest one that lives, as far as Ray knows."""
    from actors.hosts.cluster import named_actors

    found = named_actors(run_of(folder.path))[0]
    return max(found.items()) if found else None


def has_begun(folder: RunFolder) -> bool:
    """Whether there is anything of this run that it would go on from: committed steps, or ranks that live."""
    from actors.hosts.cluster import named_actors

    return bool(folder.ledger().steps or named_actors(run_of(folder.path))[1])


def taken_over(folder: RunFolder, config: RunConfig, data: str, replay: Replay | None, progress: Progress,
               interrupt: Interrupt, locked: bool = True) -> RunActors | None:
    """The run under way in this folder; None: there is none (any more). The folder must be held; locked: and there are locks, so
    that no other process is about to begin the run. Raises ConfigError: it has another configuration. JobFailed: another process
    is its driver."""
    import ray

    found = coordinator_of(folder)
    if found is None:
        return None
    epoch, coordinator = found
    try:
        present = _begun(coordinator, 0.0 if locked else _most_to_begin(config), progress, interrupt)
        if not present.begun:  # its driver died before it was told to
            ray.kill(coordinator)
            return None
        if present.stopping:
            _wait_for_its_end(coordinator, present.config, progress, interrupt)
            _end_all(folder)
            return None
        _check_same(config, present.config, _FREE, f"stop it first ({cli.program('stop')})")
        driver = uuid.uuid4().hex
        told = _accepted(coordinator, driver, folder, interrupt)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # it is dead, or as good as that
        ray.kill(coordinator)
        return None
    progress.say("took over the run: its driver was lost")
    return RunActors.of(coordinator, told, epoch, driver, present.config, present.layout, present.address, data, replay)


def left_ranks(folder: RunFolder, config: RunConfig, progress: Progress) -> dict[Member, Any]:
    """Ranks of this run that live without a coordinator; the folder must be held. Those that are of no use are ended."""
    import ray

    from actors.hosts.cluster import named_actors

    ranks = newest(named_actors(run_of(folder.path))[1])
    if not ranks:
        return {}
    asked = {actor.configuration.remote(): member for member, actor in ranks.items()}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answering = {asked[reference]: before for reference in ready if (before := _value(reference)) is not None}
    if not answering:
        refused = "none of them answers"
    elif found := next(filter(None, (_difference(config, before, _FREE_OF_RANKS) for before in answering.values())), None):
        refused = f"{found[0]} = {found[1]} now, {found[2]} before"
    else:
        progress.say(f"took over {len(answering)} ranks: driver and coordinator were lost")
        return {member: ranks[member] for member in answering}
    progress.say(f"ranks of this run that were left behind are ended: {refused}")
    _end_all(folder)
    return {}


def _value(reference: Any) -> Any:
    """None: the actor has died."""
    import ray

    try:
        return ray.get(reference, timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return None


def _most_to_begin(config: RunConfig) -> float:
    """How long a driver that lives may take until it tells its coordinator to begin: its ranks look into the run's folder first. Less
    than ranks wait that were left behind: should that driver have died, they are to be taken over still."""
    return min(START_TIMEOUT_SECONDS, config.elastic.orphan_seconds / 2)


def _begun(coordinator: Any, seconds: float, progress: Progress, interrupt: Interrupt) -> Any:
    """What it says of itself (Present) when it has begun, or after so many seconds. Raises RayActorError, GetTimeoutError."""
    import ray

    until, told = time.monotonic() + seconds, False
    while True:
        present = ray.get(coordinator.present.remote(), timeout=ANSWER_SECONDS)
        if present.begun or time.monotonic() >= until:
            return present
        if not told:
            progress.say("another process is about to begin this run, or has died: waiting for it to")
            told = True
        interrupt.wait(POLL_SECONDS)


def _accepted(coordinator: Any, driver: str, folder: RunFolder, interrupt: Interrupt) -> int:
    """The number of the newest update. Raises JobFailed: another driver lives. RayActorError, GetTimeoutError."""
    import ray

    deadline = time.monotonic() + _REFUSED_SECONDS
    while True:
        found = ray.get(coordinator.follow.remote(driver), timeout=ANSWER_SECONDS)
        if not isinstance(found, Failure):
            return found
        if time.monotonic() > deadline:
            raise cli.JobFailed(f"{folder.path}: {found.reason}")
        interrupt.wait(POLL_SECONDS)


def _wait_for_its_end(coordinator: Any, config: RunConfig, progress: Progress, interrupt: Interrupt) -> None:
    """Of a run that was told to stop. Raises JobFailed: it takes too long. RayActorError, GetTimeoutError."""
    import ray

    progress.say("the run was told to stop, and is being saved: waiting for its end")
    deadline = time.monotonic() + config.training.step_timeout_seconds + config.elastic.storage_seconds
    while ray.get(coordinator.outcome.remote(POLL_SECONDS), timeout=ANSWER_SECONDS) is None:
        if time.monotonic() > deadline:
            raise cli.JobFailed("the run that was told to stop does not end")
        interrupt.check()


def _end_all(folder: RunFolder) -> None:
    """Raises JobFailed: they do not end."""
    from actors.hosts.cluster import end_actors

    if not end_actors(run_of(folder.path), _REFUSED_SECONDS):
        raise cli.JobFailed(f"{folder.path}: actors of this run do not end")


def _check_same(config: RunConfig, before: RunConfig, free: tuple[str, ...], otherwise: str) -> None:
    """Raises ConfigError."""
    if (found := _difference(config, before, free)) is not None:
        key, wanted, present = found
        raise ConfigError(key, wanted, f"{present}, as in the run under way that this command would take over; {otherwise}")


def _difference(config: RunConfig, before: RunConfig, free: tuple[str, ...]) -> tuple[str, Any, Any] | None:
    """The first setting that differs: its key, what it is now, what it was before."""
    was = dict(_settings(before))
    for key, value in _settings(config):
        settled = key == "topology.resource" and value == "auto"
        if value != was.get(key) and not settled and not any(key == one or key.startswith(f"{one}.") for one in free):
            return key, value, was.get(key)
    return None


def _settings(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for section, found in config.model_dump().items():
        for leaf, value in found.items():
            yield f"{section}.{leaf}", value
