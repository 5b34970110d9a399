"""A run under way, seen from the process that started it or took it over: its actors, and the signals that end it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from actors.calls.messages import Failure, Outcome, Start
from actors.files import storage
from actors.files.names import of_coordinator, run_of
from actors.files.run_folder import RunFolder, Token
from jobs import cli
from jobs.driver import session
from jobs.driver.progress import Progress
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.protocol.events import Ending
from orchestrator.protocol.members import Member
from orchestrator.recovery.replay import Replay

START_TIMEOUT_SECONDS = 300.0
ANSWER_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.2
MOST_RESTARTS = 3
"""Of the coordinator, without a step in between."""
_END_SECONDS = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """SIGINT and SIGTERM as a flag: the first asks the run to save and end, the second ends it at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.install()

    def install(self) -> None:
        for number in _SIGNALS:
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


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals are ignored meanwhile: all that they ask for is being done."""
    main = threading.current_thread() is threading.main_thread()
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in _SIGNALS] if main else []
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class TakenOver(cli.JobFailed):
    """Another process is the driver of this run now."""


class CoordinatorLost(cli.JobFailed):
    """Its process or node has ended, or it does not answer."""


class RunActors:
    """The actors of a run: they end with the `with` block if the run is over, was refused, or is to end at once. With another
    driver they go on, and for `elastic.orphan_seconds` without one, whatever has ended this process.

    Ranks do not end with the coordinator. Where that dies, another one goes on with them. left: ranks of this run that live
    already, without a coordinator. evaluate: a checkpoint to be evaluated only: nobody can take that over.
    """

    def __init__(self, config: RunConfig, layout: Layout, data: str, replay: Replay | None = None, evaluate: str | None = None,
                 left: Mapping[Member, Any] | None = None):
        self._set_up(config, layout, data, replay, evaluate)
        self._under_way = bool(left)
        try:
            if left:
                self._start(left, Start(tuple(left), left_behind=True, replay=replay))
            else:
                self._create()
                self._start(self._ranks, Start(tuple(self._ranks) if replay else None, replay=replay, evaluate=evaluate))
        except BaseException as error:
            self._close(error)
            raise

    @classmethod
    def of(cls, coordinator: Any, told: int, epoch: int, driver: str, config: RunConfig, layout: Layout, address: str, data: str,
           replay: Replay | None) -> Self:
        """Of a run under way, whose coordinator knows this process as its driver. told: number of the last update seen."""
        found = cls.__new__(cls)
        found._set_up(config, layout, data, replay, None)
        found._coordinator, found._told, found._epoch, found._driver = coordinator, told, epoch, driver
        found.address, found._begun, found._under_way = address, True, True
        return found

    def _set_up(self, config: RunConfig, layout: Layout, data: str, replay: Replay | None, evaluate: str | None) -> None:
        import ray

        self._ray, self._config, self._layout, self._data = ray, config, layout, data
        self._replay, self._evaluate = replay, evaluate
        self._folder = RunFolder(config.run.directory, config.run.name)
        self._name = "" if evaluate is not None else run_of(self._folder.path)
        self._ranks: dict[Member, Any] = {}
        self._coordinator: Any = None
        self._told, self._epoch, self._driver = 0, 0, uuid.uuid4().hex
        self._begun, self._under_way, self.address = False, False, ""
        if self._name:
            session.answer_for(config)

    def __enter__(self) -> RunActors:
        try:
            if not self.address:
                self._open()
            return self
        except BaseException as error:
            self._close(error)
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._close(error)

    def ends(self, error: BaseException | None) -> bool:
        """Whether nobody wants these actors any more when the `with` block ends so. What happens to this process alone is no
        reason: others can find what is under way, unless Ray itself runs in this process."""
        if isinstance(error, TakenOver):
            return False
        if not self._under_way or not self._name or session.is_local():
            return True
        if isinstance(error, CoordinatorLost):
            return False
        return error is None or isinstance(error, KeyboardInterrupt | ConfigError | cli.JobFailed)

    def check_reachable(self) -> None:
        """Of ranks that this process has created; one that is lost meanwhile is the coordinator's to do without. Ranks that were
        left behind have seen the folder.

        Raises ConfigError: a node does not see the run folder. JobFailed: they do not start, or none is left. StorageError.
        """
        if not self._ranks:
            return
        token = self._folder.token(".reachable")
        try:
            self._check_reachable(token)
        finally:
            with contextlib.suppress(storage.StorageError):
                storage.delete(token.path)

    def _check_reachable(self, token: Token) -> None:
        asked = {actor.reads.remote(token.path, token.content): member for member, actor in self._ranks.items()}
        if self._ray.wait(list(asked), num_returns=len(asked), timeout=START_TIMEOUT_SECONDS)[1]:
            raise cli.JobFailed(f"actors did not start within {START_TIMEOUT_SECONDS:g} s; does the cluster have room?")
        blind, lost = set(), []
        for reference, member in asked.items():
            try:
                if not self._ray.get(reference):
                    blind.add(member.node)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.ActorUnschedulableError) as error:
                lost.append(error)
            except self._ray.exceptions.RayTaskError as error:
                raise cli.JobFailed(_one_line(error.cause or error)) from error
        if len(lost) == len(asked):
            raise cli.JobFailed(f"all ranks were lost as they started: {_one_line(lost[0])}") from lost[0]
        if blind:
            raise ConfigError("run.directory", self._config.run.directory,
                              f"a path or URI that every node reads; these do not: {', '.join(sorted(blind))}")

    def follow(self, progress: Progress, interrupt: Interrupt, seen: Callable[[str], object] = lambda address: None) -> Outcome:
        """Show what happens until the run ends. seen: told each time where the coordinator exports. Raises JobFailed with the
        reason; TakenOver.

        Once it is asked to stop, the trainer bounds its step and its save (training.step_timeout_seconds); a second signal ends
        it.
        """
        lost, idle, stopping = False, 0, None
        while True:
            try:
                if lost:
                    self._restart(progress)
                elif not self._begun:
                    self._begin()
                updates, over = self._updates()
            except CoordinatorLost:
                if idle >= MOST_RESTARTS:
                    raise cli.JobFailed(f"the coordinator was lost {idle + 1} times without a step in between") from None
                lost, idle = True, idle + 1
                continue
            lost, idle = False, 0 if _show(updates, progress) else idle
            if over:
                return self._outcome()
            seen(self.address)
            if interrupt.requested and stopping is not self._coordinator:  # which this process still drives: it was told just now
                if stopping is None:
                    progress.say("stopping: saving after the step under way; another signal ends the run at once")
                stopping = self._coordinator
                stopping.stop.remote()
            time.sleep(POLL_SECONDS)

    # --- the coordinator -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.address = self._get(self._coordinator.open.remote())

    def _begin(self) -> None:
        self._under_way = True  # from the call on, if its answer is lost
        self._get(self._coordinator.begin.remote(self._driver))
        self._begun = True

    def _start(self, ranks: Mapping[Member, Any], start: Start) -> None:
        """Raises JobFailed: somebody else has started one."""
        from actors.hosts.cluster import beside_the_driver, outliving
        from actors.hosts.coordinator import Coordinator

        options = beside_the_driver()
        if self._name:
            self._epoch = max(self._epoch, self._last_epoch(start.left_behind)) + 1
            options |= outliving(of_coordinator(self._name, self._epoch))
        self._told = 0
        try:
            self._coordinator = Coordinator.options(**options).remote(
                self._config, self._layout, list(ranks.values()), self._data, start, self._name)
        except ValueError as error:
            raise TakenOver(f"{self._folder.path}: another process has just begun this run ({_one_line(error)})") from None

    def _last_epoch(self, left_behind: bool) -> int:
        """Of the coordinators so far. Raises StorageError: of ranks that were left behind, which hold the run's state, not for a
        moment without storage."""
        until = time.monotonic() + (self._config.elastic.storage_seconds if left_behind else 0.0)
        while True:
            try:
                return self._folder.ledger().epoch
            except storage.Damaged:
                raise
            except storage.StorageError:
                if time.monotonic() >= until:
                    raise
            time.sleep(POLL_SECONDS)

    def _restart(self, progress: Progress) -> None:
        """Another coordinator for the ranks that there are; those that do not live will not answer it."""
        from actors.hosts.cluster import named_actors

        if self._evaluate is not None:
            raise cli.JobFailed("the coordinator was lost")
        progress.say("the coordinator was lost: another one takes over")
        self._ray.kill(self._coordinator)  # should it be out of reach only
        coordinators, ranks = named_actors(self._name)
        if max(coordinators, default=0) > self._epoch:
            raise TakenOver(f"{self._folder.path}: another process has taken this run over")
        ranks = newest(ranks)
        if not ranks:
            self._create()
            ranks = self._ranks
        self._start(ranks, Start(tuple(ranks), left_behind=True, replay=self._replay))
        self._open()
        progress.say(f"metrics      http://{self.address}/metrics, targets http://{self.address}/targets")
        self._begin()

    def _updates(self) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
        """What happened since the last time, and whether the run is over. Raises CoordinatorLost, TakenOver."""
        errors = self._ray.exceptions
        try:
            found = self._ray.get(self._coordinator.updates.remote(self._driver, self._told), timeout=ANSWER_TIMEOUT_SECONDS)
        except (errors.RayActorError, errors.GetTimeoutError) as error:
            raise CoordinatorLost(_one_line(error)) from error
        if isinstance(found, Failure):
            raise TakenOver(found.reason)
        self._told, updates, over = found
        return updates, over

    def _outcome(self) -> Outcome:
        """Raises JobFailed: it has failed. TakenOver: another coordinator has the run, so somebody else drives it."""
        self._under_way = False
        return self._get(self._coordinator.outcome.remote(0.0))

    # --- actors --------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """The first ranks. Raises JobFailed: there are actors of these names."""
        from actors.hosts.stage_actor import create

        try:
            for member in _members(self._layout, self._replay):
                self._ranks[member] = create(self._config, member, self._name, anywhere=self._replay is not None)
        except ValueError as error:
            raise TakenOver(f"{self._folder.path}: another process begins this run ({_one_line(error)})") from None

    def _close(self, error: BaseException | None) -> None:
        if self.ends(error):
            with _undisturbed():
                self._end()
            return
        session.leave_requests()
        if not isinstance(error, TakenOver):
            with contextlib.suppress(OSError, ValueError):  # it may be what has ended this process
                print("this process ends, the run goes on: for elastic.orphan_seconds = "
                      f"{self._config.elastic.orphan_seconds:g} the same command takes it over", file=sys.stderr, flush=True)

    def _end(self) -> None:
        """Of all: also of those that the coordinator has created."""
        from actors.hosts.cluster import end_actors

        for actor in (self._coordinator, *self._ranks.values()):
            if actor is not None:
                self._ray.kill(actor)
        if self._name:
            with contextlib.suppress(self._ray.exceptions.RayError):
                end_actors(self._name, _END_SECONDS)

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
            raise CoordinatorLost("the coordinator was lost: its process or node ended; the same command continues from the "
                                  "newest checkpoint") from error
        if isinstance(found, Failure):
            raise (TakenOver if found.ending is Ending.SUPERSEDED else cli.JobFailed)(found.reason)
        return found


def newest(ranks: Mapping[Member, Any]) -> dict[Member, Any]:
    """Of each place on a node, the newest incarnation, in the order of places."""
    found = {(member.node, member.local): member for member in sorted(ranks, key=lambda member: member.incarnation)}
    return {found[place]: ranks[found[place]] for place in sorted(found)}


def _show(updates: list[tuple[str, Any]], progress: Progress) -> bool:
    """Whether a step was committed."""
    for kind, values in updates:
        if kind == "step":
            progress.step(values)
        elif kind == "event":
            progress.event(values)
    return any(kind == "step" for kind, _ in updates)


def _members(layout: Layout, replay: Replay | None) -> tuple[Member, ...]:
    """Processes that a run begins with: for the layout, or for all that are to be repeated."""
    layouts = [layout] if replay is None else [change.layout for change in replay.changes]
    return tuple(dict.fromkeys(Member(place.node, place.local) for found in layouts for place in found.places))


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
