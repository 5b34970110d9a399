"""`python -m jobs.train --config FILE`: train a model on a Ray cluster, or on this machine where there is none.

Validates, finds the nodes, chooses the layout, puts one actor on each accelerator and hands them to a coordinator; then
shows what happens. Ctrl-C or SIGTERM saves and exits 130; the same command continues where the run stopped.
"""

from __future__ import annotations

import importlib.util
import sys
import time

from actors.calls.messages import Outcome
from actors.data.dataset import MANIFEST, Dataset, DatasetError
from actors.files import storage
from actors.files.run_folder import IN_USE, RunFolder
from jobs import cli, corpus
from jobs.driver import session, summary, takeover
from jobs.driver.live import PublishedAddress, ask
from jobs.driver.lost import ClusterWatch
from jobs.driver.progress import Progress
from jobs.driver.running import POLL_SECONDS, Interrupt, RunActors
from jobs.tokenize import load_tokenizer
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.layout.layout import Layout, choose
from orchestrator.plan import planner
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.recovery.relayout import Relaid, relaid
from orchestrator.recovery.replay import Replay, ReplayRefused
from orchestrator.recovery.replay import read as read_ledger
from orchestrator.topology import Node

CHECK_SECONDS, LONGEST_CHECK_SECONDS = 60.0, 86_400.0


def main() -> int:
    parser = cli.Parser(prog=cli.program("train"), description="Train a mixture-of-experts model across Ray actors.", examples=(
        "--config tiny --set training.steps=200", "--config deepseek_v3 --set topology.virtual_nodes=256 --dry-run"))
    cli.arguments(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="print layout, memory and microbatches, or why they are refused; the schedule is lowered and "
                             "checked; start no actor")
    parser.add_argument("--check-seconds", type=float, metavar="SECONDS", default=CHECK_SECONDS,
                        help="with --dry-run: bound on finding, lowering and checking the schedule, beyond which it says that "
                             f"it did not (default: {CHECK_SECONDS:g})")
    parser.add_argument("--replay", metavar="LEDGER.jsonl", help="repeat the steps of another run's ledger, through the layouts that "
                        "it records, on as many ranks; every loss must come out the same. Needs that run's configuration, and a "
                        "run.name of its own")
    options = parser.parse_args()
    config = cli.configuration(options)
    Deadlines.of(config)  # refuses bounds that contradict each other, here before anything runs, or is taken over and ended
    replay = _replay(options.replay, config) if options.replay else None
    directory, data = session.run_directory(config), session.data_path(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": directory})})
    if options.dry_run:
        return dry_run(config, options.check_seconds)
    interrupt = Interrupt()
    try:
        if config.data.path != "auto":
            _checked_dataset(config, data)  # before Ray takes its seconds to start
        if config.training.init_from is not None:
            _check_model_folder(config)
        if config.telemetry.tensorboard:
            _check_tensorboard(config)
        session.connect()
        interrupt.install()  # Ray has put its own handlers in place
        with ClusterWatch(_when_lost(config)):
            return train(config, data, interrupt, replay)
    except storage.StorageError as error:
        key = f"run.directory = {directory}: " if error.uri.startswith(directory) else ""
        raise cli.JobFailed(f"{key}{error}") from error
    except DatasetError as error:
        raise cli.JobFailed(str(error)) from error
    finally:
        session.ask_for_no_more()
        session.disconnect()


def _when_lost(config: RunConfig) -> str:
    """What follows when this process loses its Ray."""
    newest = "continues from the newest checkpoint"
    if session.is_local():
        return f"the same command {newest}"
    return (f"ranks that can go on do so for elastic.orphan_seconds = {config.elastic.orphan_seconds:g}; until then the same "
            f"command takes them over, later it {newest}")


def dry_run(config: RunConfig, check_seconds: float = CHECK_SECONDS) -> int:
    if not 0 < check_seconds <= LONGEST_CHECK_SECONDS:
        raise ConfigError("--check-seconds", check_seconds, f"above 0, at most {LONGEST_CHECK_SECONDS:g}")
    try:
        if not config.topology.virtual_nodes:
            session.connect()
        nodes = session.nodes(config)
        if not nodes:
            raise cli.JobFailed(f"no node{_wanted(config)} is there")
        layout = choose(nodes, config.layout, config.model, config.stages)
        print("\n".join(planner.describe(config, planner.plan(config, layout, cli.within(check_seconds)))))
    finally:
        if not config.topology.virtual_nodes:
            session.disconnect()
    return cli.DONE


def train(config: RunConfig, data: str, interrupt: Interrupt, replay: Replay | None = None) -> int:
    """Everything between a connected Ray and the exit code."""
    with Progress(config.training.steps) as progress:
        return _trained(config, data, interrupt, replay, progress)


def _trained(config: RunConfig, data: str, interrupt: Interrupt, replay: Replay | None, progress: Progress) -> int:
    folder, outcome = RunFolder(config.run.directory, config.run.name), None
    if takeover.coordinator_of(folder):
        with folder.held() as locked:
            outcome = _taken_over(config, data, folder, progress, interrupt, replay, locked)
        session.answer_for(config)  # for what was left, and has ended by now
    if outcome is None:
        outcome = _from_start(config, data, folder, progress, interrupt, replay)
    if outcome.interrupted:
        progress.say(f"interrupted: saved after step {outcome.step}; the same command continues there" if outcome.saved else
                     "interrupted while it waited for nodes: nothing was saved; the same command continues from the newest checkpoint")
        return cli.INTERRUPTED
    return cli.DONE


def _taken_over(config: RunConfig, data: str, folder: RunFolder, progress: Progress, interrupt: Interrupt,
                replay: Replay | None, locked: bool) -> Outcome | None:
    """To the end of a run whose driver was lost; None: there is none (any more)."""
    run = takeover.taken_over(folder, config, data, replay, progress, interrupt, locked)
    if run is None:
        return None
    with run:
        outcome = _followed(run, folder, progress, interrupt)
    _summarise(config, folder, data, progress)
    return outcome


def _from_start(config: RunConfig, data: str, folder: RunFolder, progress: Progress, interrupt: Interrupt,
                replay: Replay | None) -> Outcome:
    """From the nodes that there are to the end of the run."""
    nodes = () if replay else _nodes(config, progress, interrupt)
    config = session.settled(config)
    found = Relaid(config, replay.at(0).layout) if replay else _laid_out(config, nodes, folder)
    layout = found.layout
    progress.say("\n".join([*planner.describe(found.config, planner.plan(found.config, layout)), *found.notes]))
    with folder.held() as locked:
        if (there := ask(folder.path)) and (not locked or there.get("folder") == folder.path):
            raise cli.JobFailed(f"{folder.path}: {IN_USE}")
        corpus.prepare(config, data)
        _checked_dataset(config, data)
        if replay and folder.ledger_lines():
            raise ConfigError("run.name", config.run.name, "a run that has no steps yet, with --replay")
        outcome = _run(config, layout, data, folder, progress, interrupt, replay)
        _summarise(config, folder, data, progress)
    return outcome


def _laid_out(config: RunConfig, nodes: tuple[Node, ...], folder: RunFolder) -> Relaid:
    """As it is configured; of a run that has begun, where these nodes do not allow that, as it would be while it runs.

    Raises ConfigError.
    """
    try:
        return Relaid(config, choose(nodes, config.layout, config.model, config.stages))
    except ConfigError:
        if not takeover.has_begun(folder):
            raise
        return relaid(config, nodes, None)


def _nodes(config: RunConfig, progress: Progress, interrupt: Interrupt) -> tuple[Node, ...]:
    """Those to begin with: at least `elastic.min_nodes`, which are waited for, and at most `max_nodes`.

    Raises JobFailed: they do not come; ConfigError: they cannot.
    """
    elastic, since = config.elastic, time.monotonic()
    if 0 < config.topology.virtual_nodes < elastic.min_nodes:
        raise ConfigError("elastic.min_nodes", elastic.min_nodes, f"at most topology.virtual_nodes = {config.topology.virtual_nodes}")
    found = session.nodes(config)
    if len(found) < elastic.min_nodes:
        progress.say(f"waiting: {len(found)} of at least {elastic.min_nodes} nodes are there{_wanted(config)}")
        session.ask_for_nodes(config)
    while len(found) < elastic.min_nodes:
        if elastic.wait_seconds is not None and time.monotonic() - since > elastic.wait_seconds:
            raise cli.JobFailed(f"no more than {len(found)} of at least {elastic.min_nodes} nodes{_wanted(config)} within "
                                f"elastic.wait_seconds = {elastic.wait_seconds:g}")
        interrupt.wait(POLL_SECONDS)
        before, found = len(found), session.nodes(config)
        if len(found) > before:
            session.ask_for_nodes(config)  # it may be known only now how large they are
    return found if elastic.max_nodes == "auto" else found[: elastic.max_nodes]


def _wanted(config: RunConfig) -> str:
    """What nodes must have, if anything."""
    wanted = [f"{label} = {value}" for label, value in config.topology.labels.items()]
    if config.topology.resource != "auto":
        wanted.append(f"the resource {config.topology.resource}")
    return f" with {', '.join(wanted)}" if wanted else ""


def _run(config: RunConfig, layout: Layout, data: str, folder: RunFolder, progress: Progress, interrupt: Interrupt,
         replay: Replay | None) -> Outcome:
    """From actors to the end of the run."""
    interrupt.check()
    with RunActors(config, layout, data, replay, left=takeover.left_ranks(folder, config, progress)) as run:
        run.check_reachable()
        return _followed(run, folder, progress, interrupt)


def _followed(run: RunActors, folder: RunFolder, progress: Progress, interrupt: Interrupt) -> Outcome:
    """To its end. Where it can be asked stands in the folder meanwhile."""
    announced = PublishedAddress(folder, session.ray_address(), session.is_local())
    progress.say(f"watch        http://{run.address}/ or {cli.program('status')} {folder.path} --watch")
    progress.say(f"metrics      http://{run.address}/metrics, targets http://{run.address}/targets")
    announced(run.address)
    try:
        return run.follow(progress, interrupt, announced)
    finally:
        if run.ends(sys.exception()):
            announced.withdraw()


def _check_tensorboard(config: RunConfig) -> None:
    """Raises ConfigError: there is no writer, or nothing that it can write to."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("telemetry.tensorboard", True, "false, for tensorboard is not installed (pip install 'dualray[tensorboard]')")
    if not storage.is_local(config.run.directory):
        raise ConfigError("telemetry.tensorboard", True, f"false, for run.directory = {config.run.directory} is no local path")


def _replay(ledger: str, config: RunConfig) -> Replay:
    """Raises ConfigError: it cannot be read, or not repeated with this configuration."""
    try:
        return read_ledger(storage.read_bytes(ledger).decode("utf-8").splitlines(), config)
    except (storage.StorageError, UnicodeDecodeError, ReplayRefused) as error:
        raise ConfigError("--replay", ledger, f"the ledger of a run with this configuration ({error})") from None


def _checked_dataset(config: RunConfig, data: str) -> Dataset:
    """Raises ConfigError: no data there, or data that this configuration cannot use. DatasetError: damaged."""
    if not storage.exists(storage.join(data, MANIFEST)):
        raise ConfigError("data.path", data,
                          f"a folder that {cli.program('tokenize')} has finished, or auto; it has no manifest.json")
    dataset = Dataset.open(data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    dataset.check(config.data.tokenizer, tokenizer.fingerprint, config.model.vocab_size, config.data.sequence_length)
    return dataset


def _check_model_folder(config: RunConfig) -> None:
    """Raises ConfigError: there is no model, or another one."""
    from actors.state.hugging_face import FolderError, ModelFolder  # it needs torch, which takes seconds

    try:
        ModelFolder(config.training.init_from).check(config.model)
    except FolderError as error:
        raise ConfigError("training.init_from", config.training.init_from, f"a folder with this model ({error})") from None


def _summarise(config: RunConfig, folder: RunFolder, data: str, progress: Progress) -> None:
    """Of a run that has ended: it has not failed for want of its summary."""
    try:
        steps, validation = folder.metric_lines(), summary.validations(folder.events())
        baselines = corpus.baselines(Dataset.open(data), config.training.validation_sequences)
        told = summary.lines(steps, validation, baselines, folder.path)
        folder.write("summary.png", summary.picture(steps, validation, baselines))
    except (storage.StorageError, DatasetError) as error:
        told = [f"no summary: {error}"]
    progress.say("\n".join(told))


if __name__ == "__main__":
    sys.exit(cli.run(main))
