"""A run under way, seen from the process that started it: its actors, and the signals that end it."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from actors.messages import Failure
from jobs import cli
from jobs.progress import Progress
from orchestrator.config import ConfigError, RunConfig
from orchestrator.layout import Layout

if TYPE_CHECKING:  # torch takes seconds to import, and this process has no use for it
    from actors.trainer import Outcome

START_TIMEOUT_SECONDS = 300.0
ANSWER_TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 0.2
GRACE_SECONDS = 120.0


class Interrupt:
    """SIGINT and SIGTERM as a flag: the first asks the run to save and end, the second ends it at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.install()

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()


class RunActors:
    """The actors of a run, owned by this process: they end with the `with` block, however it ends."""

    def __init__(self, config: RunConfig, layout: Layout, ranks: list[Any], data: str):
        import ray

        from actors.coordinator import Coordinator

        self._ray, self._config, self._layout, self._ranks = ray, config, layout, ranks
        self._coordinator = Coordinator.remote(config, layout, ranks, data)

    def __enter__(self) -> RunActors:
        try:
            self.address = self._get(self._coordinator.open.remote())
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        for actor in (self._coordinator, *self._ranks):
            self._ray.kill(actor)

    def check_reachable(self, path: str, token: str) -> None:
        """Raises ConfigError: a node does not see the run folder."""
        seen = self._get([actor.reads.remote(path, token) for actor in self._ranks])
        blind = sorted({place.node for place, ok in zip(self._layout.places, seen) if not ok})
        if blind:
            raise ConfigError("run.directory", self._config.run.directory,
                              f"a path or URI that every node reads; these do not: {', '.join(blind)}")

    def follow(self, progress: Progress, interrupt: Interrupt) -> Outcome:
        """Show what happens until the run ends. Raises JobFailed with the reason."""
        running, told, deadline = self._coordinator.run.remote(), 0, None
        while True:
            done, _ = self._ray.wait([running], timeout=POLL_SECONDS)
            if interrupt.requested and deadline is None:
                progress.say("stopping: saving after the step under way")
                self._coordinator.stop.remote()
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and not done and time.monotonic() > deadline:
                raise cli.JobFailed(f"the run did not save within {GRACE_SECONDS:g} s of being asked to stop")
            told = self._show(told, progress)
            if done:
                return self._get(running)

    def _show(self, told: int, progress: Progress) -> int:
        """Tell what happened after update number `told`; returns the number of the newest."""
        try:
            told, updates = self._ray.get(self._coordinator.updates.remote(told), timeout=ANSWER_TIMEOUT_SECONDS)
        except self._ray.exceptions.RayActorError:
            return told  # the run's own result says why
        except self._ray.exceptions.GetTimeoutError:
            raise cli.JobFailed(f"the coordinator did not answer within {ANSWER_TIMEOUT_SECONDS:g} s") from None
        for kind, values in updates:
            if kind == "step":
                progress.step(values)
            elif kind == "event":
                progress.event(values)
        return told

    def _get(self, references: Any) -> Any:
        """A result, within a bound. Raises JobFailed in one line: a Failure came, an actor raised, died or did not start."""
        errors = self._ray.exceptions
        try:
            found = self._ray.get(references, timeout=START_TIMEOUT_SECONDS)
        except errors.GetTimeoutError:
            raise cli.JobFailed(f"actors did not start within {START_TIMEOUT_SECONDS:g} s; does the cluster have room?") from None
        except errors.RayTaskError as error:
            raise cli.JobFailed(_one_line(error.cause or error)) from error
        except errors.RayActorError as error:
            lost = "a rank" if isinstance(references, list) else "the coordinator"
            raise cli.JobFailed(f"{lost} was lost: its process or node ended; the same command continues from the newest "
                                "checkpoint") from error
        if isinstance(found, Failure):
            raise cli.JobFailed(found.reason)
        return found


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
