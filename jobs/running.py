"""A run under way, seen from the process that started it: its actors, and the signals that end it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from actors.messages import Failure, Outcome, Start
from jobs import cli
from jobs.progress import Progress
from orchestrator.config import ConfigError, RunConfig
from orchestrator.layout import Layout
from orchestrator.membership import Member
from orchestrator.replay import Replay

START_TIMEOUT_SECONDS = 300.0
ANSWER_TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 0.2
MOST_RESTARTS = 3
"""Of the coordinator, without a step in between."""


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

    def wait(self, seconds: float) -> None:
        """Raises KeyboardInterrupt: one came meanwhile."""
        self._event.wait(seconds)
        self.check()

    def _handle(self, number: int, frame: Any) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()


class RunActors:
    """The actors of a run, owned by this process: they end with the `with` block, however it ends.

    Ranks do not end with the coordinator. Where that dies, another one goes on with them.
    """

    def __init__(self, config: RunConfig, layout: Layout, data: str, replay: Replay | None = None, evaluate: str | None = None):
        import ray

        from jobs.session import create_rank

        self._ray, self._config, self._layout, self._data = ray, config, layout, data
        self._replay, self._evaluate, members = replay, evaluate, _members(layout, replay)
        self._ranks = {member: create_rank(config, member.node, replay is not None) for member in members}
        self._start(Start(members if replay else None, replay=replay, evaluate=evaluate))

    def __enter__(self) -> RunActors:
        try:
            self.address = self._get(self._coordinator.open.remote())
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        for actor in (self._coordinator, *self._ranks.values()):
            self._ray.kill(actor)

    def check_reachable(self, path: str, token: str) -> None:
        """Raises ConfigError: a node does not see the run folder."""
        seen = self._get([actor.reads.remote(path, token) for actor in self._ranks.values()])
        blind = sorted({member.node for member, ok in zip(self._ranks, seen) if not ok})
        if blind:
            raise ConfigError("run.directory", self._config.run.directory,
                              f"a path or URI that every node reads; these do not: {', '.join(blind)}")

    def follow(self, progress: Progress, interrupt: Interrupt, moved: Callable[[str], object] = lambda address: None) -> Outcome:
        """Show what happens until the run ends. moved: told where another coordinator exports. Raises JobFailed with the reason.

        Once it is asked to stop, the trainer bounds its step and its save (training.step_timeout_seconds); a second signal ends it.
        """
        running, stopping, idle = self._coordinator.run.remote(), False, 0
        while True:
            done, _ = self._ray.wait([running], timeout=POLL_SECONDS)
            if interrupt.requested and not stopping:
                progress.say("stopping: saving after the step under way; another signal ends the run at once")
                self._coordinator.stop.remote()
                stopping = True
            idle = 0 if self._show(progress) else idle
            if done and self._died(running):
                if idle >= MOST_RESTARTS:
                    raise cli.JobFailed(f"the coordinator was lost {idle + 1} times without a step in between")
                idle += 1
                running = self._restart(progress)
                moved(self.address)
                if interrupt.requested:
                    self._coordinator.stop.remote()
            elif done:
                return self._get(running)

    # --- the coordinator -----------------------------------------------------------------------------------------

    def _start(self, start: Start) -> None:
        from actors.cluster import beside_the_driver
        from actors.coordinator import Coordinator

        self._told = 0
        self._coordinator = Coordinator.options(**beside_the_driver()).remote(
            self._config, self._layout, list(self._ranks.values()), self._data, start)

    def _died(self, running: Any) -> bool:
        try:
            self._ray.get(running, timeout=0)
        except self._ray.exceptions.RayActorError:
            return True
        except self._ray.exceptions.RayError:
            return False
        return False

    def _restart(self, progress: Progress) -> Any:
        """Another coordinator for the ranks that there are; those that do not live will not answer it."""

        if self._evaluate is not None:
            raise cli.JobFailed("the coordinator was lost")
        progress.say("the coordinator was lost: another one takes over")
        self._start(Start(tuple(self._ranks), left_behind=True, replay=self._replay))
        self.address = self._get(self._coordinator.open.remote())
        progress.say(f"metrics      http://{self.address}/metrics, targets http://{self.address}/targets")
        return self._coordinator.run.remote()

    def _create(self, member: Member) -> None:
        """A rank process that the coordinator wants. It dies with this process, not with the coordinator."""
        from jobs.session import create_rank

        for before in [known for known in self._ranks if (known.node, known.local) == (member.node, member.local)]:
            self._ray.kill(self._ranks.pop(before))
        self._ranks[member] = create_rank(self._config, member.node)
        self._coordinator.admit.remote(member, self._ranks[member])

    def _show(self, progress: Progress) -> bool:
        """Tell what happened since the last time; whether a step was committed."""
        try:
            self._told, updates = self._ray.get(self._coordinator.updates.remote(self._told), timeout=ANSWER_TIMEOUT_SECONDS)
        except self._ray.exceptions.RayActorError:
            return False  # the run's own result says why
        except self._ray.exceptions.GetTimeoutError:
            raise cli.JobFailed(f"the coordinator did not answer within {ANSWER_TIMEOUT_SECONDS:g} s") from None
        for kind, values in updates:
            if kind == "step":
                progress.step(values)
            elif kind == "event":
                progress.event(values)
            elif kind == "spawn":
                self._create(values["member"])
        return any(kind == "step" for kind, _ in updates)

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


def _members(layout: Layout, replay: Replay | None) -> tuple[Member, ...]:
    """Processes that a run begins with: for the layout, or for all that are to be repeated."""
    layouts = [layout] if replay is None else [change.layout for change in replay.changes]
    return tuple(dict.fromkeys(Member(place.node, place.local) for found in layouts for place in found.places))


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
