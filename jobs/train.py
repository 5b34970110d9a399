"""`python -m jobs.train --config FILE`: train a model on a Ray cluster, or on this machine where there is none.

Validates, finds the nodes, chooses the layout, puts one actor on each accelerator and hands them to a coordinator; then
shows what happens. Ctrl-C or SIGTERM saves and exits 130; the same command continues where the run stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import uuid
from typing import Any

from actors import storage
from actors.dataset import Dataset, DatasetError
from actors.run_folder import RunFolder
from actors.tokenizer import TokenizerError
from actors.tokenizer import load as load_tokenizer
from jobs import cli, corpus, session, summary
from jobs.progress import Progress
from orchestrator import planner
from orchestrator.config import ConfigError, RunConfig, dump
from orchestrator.layout import Layout, choose

START_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.2
GRACE_SECONDS = 120.0


def main() -> int:
    parser = cli.Parser(prog="jobs.train", description="Train a mixture-of-experts model across Ray actors.")
    cli.arguments(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="print layout, memory and microbatches, or why they are refused; start no actor")
    options = parser.parse_args()
    config = cli.configuration(options)
    directory, data = session.run_directory(config), session.data_path(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": directory})})
    if options.dry_run:
        return dry_run(config)
    interrupt = Interrupt()
    try:
        session.connect()
        return train(config, data, interrupt)
    except (storage.StorageError, DatasetError) as error:
        raise cli.JobFailed(str(error)) from error
    finally:
        session.disconnect()


def dry_run(config: RunConfig) -> int:
    if not config.topology.virtual_nodes:
        session.connect()
    try:
        layout = choose(session.nodes(config), config.layout, config.model)
        print("\n".join(planner.describe(config, planner.plan(config, layout))))
    finally:
        if not config.topology.virtual_nodes:
            session.disconnect()
    return cli.DONE


def train(config: RunConfig, data: str, interrupt: Interrupt) -> int:
    """Everything between a connected Ray and the exit code."""
    layout = choose(session.nodes(config), config.layout, config.model)
    progress = Progress(config.training.steps)
    progress.say("\n".join(planner.describe(config, planner.plan(config, layout))))
    folder = RunFolder(config.run.directory, config.run.name)
    token = uuid.uuid4().hex
    token_path = folder.write(".reachable", token)
    corpus.prepare(config, data)
    dataset = _checked_dataset(config, data)
    folder.write("config.yaml", dump(config))
    interrupt.check()
    actors = session.create_ranks(config, layout)
    with _RunActors(config, layout, actors, data) as run:
        run.check_reachable(token_path, token)
        progress.say(f"metrics      http://{run.address}/metrics, targets http://{run.address}/targets")
        outcome = run.follow(progress, interrupt)
    storage.delete(token_path)
    _summarise(config, folder, dataset, progress)
    if outcome.interrupted:
        progress.say(f"interrupted: saved after step {outcome.step}; the same command continues there")
        return cli.INTERRUPTED
    return cli.DONE


class Interrupt:
    """SIGINT and SIGTERM as a flag: the first asks the run to save and end, the second ends it at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
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


class _RunActors:
    """The actors of a run, owned by this process: they end with the `with` block, however it ends."""

    def __init__(self, config: RunConfig, layout: Layout, ranks: list[Any], data: str):
        import ray
        from actors.coordinator import Coordinator

        self._ray, self._config, self._layout, self._ranks = ray, config, layout, ranks
        self._coordinator = Coordinator.remote(config, layout, ranks, data)

    def __enter__(self) -> _RunActors:
        try:
            self.address = self._get(self._coordinator.address.remote())
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

    def follow(self, progress: Progress, interrupt: Interrupt) -> Any:
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
        try:
            told, updates = self._ray.get(self._coordinator.updates.remote(told), timeout=START_TIMEOUT_SECONDS)
        except self._ray.exceptions.RayActorError:
            return told  # the run's own result says why
        for kind, values in updates:
            if kind == "step":
                progress.step(values)
            elif kind == "event":
                progress.event(values)
        return told

    def _get(self, references: Any) -> Any:
        """Raises JobFailed or ConfigError in one line instead of Ray's traceback."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(references, timeout=START_TIMEOUT_SECONDS)
        except errors.GetTimeoutError:
            raise cli.JobFailed(f"actors did not start within {START_TIMEOUT_SECONDS:g} s; does the cluster have room?") from None
        except errors.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            if isinstance(cause, ConfigError):
                raise cause from None
            raise cli.JobFailed(_one_line(cause)) from error
        except errors.RayActorError as error:
            cause = error.__cause__ or error
            raise cli.JobFailed(_actor_failure(cause)) from error


def _checked_dataset(config: RunConfig, data: str) -> Dataset:
    dataset = Dataset.open(data)
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except TokenizerError as error:
        raise ConfigError("data.tokenizer", config.data.tokenizer, str(error)) from error
    dataset.check(tokenizer.fingerprint, config.model.vocab_size, config.data.sequence_length)
    return dataset


def _summarise(config: RunConfig, folder: RunFolder, dataset: Dataset, progress: Progress) -> None:
    steps = folder.metric_lines()
    validation = [(event["step"], event["loss"]) for event in folder.event_lines() if event["event"] == "validation"]
    baselines = corpus.baselines(dataset)
    folder.write("summary.png", summary.picture(steps, validation, baselines))
    progress.say("\n".join(summary.lines(steps, validation, baselines, folder.path)))


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _actor_failure(error: BaseException) -> str:
    """A failed constructor carries its cause in the last lines of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        for name in ("PortInUse", "ConfigError", "StorageError", "DatasetError"):
            if f"{name}: " in line:
                return line.partition(f"{name}: ")[2]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(cli.run(main))
