"""`python -m jobs.status [RUN] [--watch]`: where a run stands: what its files say, and where it is under way what its coordinator
does, from any host that reaches both. Without a folder: the newest run in `run.directory`. `python -m jobs.status audit RUN`: proves
from the tokenized shards that each sequence of each committed step was used exactly once; one line per problem, and exit code 1.

Both read only. The configuration is the run folder's, unless `--config` names another;
`--set data.path=...` says where the data is if it has moved.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import yaml

from actors.data.dataset import Dataset, DatasetError
from actors.files import storage
from jobs import audit, cli
from jobs.driver import live, session
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.data.ledger import committed_by
from orchestrator.told import kinds
from orchestrator.told.consumers import Kind, Selection
from orchestrator.told.lines import Told, read, to_json

AUDIT = "audit"
_EXAMPLES = ("tiny --watch", "tiny --json --set run.directory=/shared/runs")
_AUDIT_EXAMPLES = ("tiny", "runs/tiny --json --set data.path=/shared/tokens")
_CLEAR, _WATCH_SECONDS = "\x1b[H\x1b[2J", 1.0
_TAIL_BYTES = 1 << 20
_CHECKPOINT = re.compile(r"step-(\d+)")
_READ = Selection((kinds.GenerationFormed, kinds.GenerationLoaded, kinds.Validated), leaves=(
    kinds.LayoutPlanned, kinds.Resumed, kinds.StartedOver, kinds.ExpertsPlaced, kinds.RanksLost, kinds.Interrupted,
    kinds.RanksAborted, kinds.CommittedStateLost, kinds.CoordinatorRestarted, kinds.NodesJoining, kinds.NodesDraining,
    kinds.NodesAwaited, kinds.NodeIdle, kinds.NodeBarred, kinds.Slow, kinds.SlowOver, kinds.CheckpointWritten,
    kinds.CheckpointFailed, kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway, kinds.DataAway,
    kinds.ControlStoreAway, kinds.ControlStoreBack, kinds.NotFinite, kinds.Replayed, kinds.UnknownEvent))


def main() -> int:
    """The words of the command line, so that `audit` stands before the folder and plain status needs no word."""
    auditing = sys.argv[1:2] == [AUDIT]
    parser = cli.Parser(prog=cli.program("status") + (f" {AUDIT}" if auditing else ""), description=_description(),
                        examples=_AUDIT_EXAMPLES if auditing else _EXAMPLES)
    parser.add_argument("folder", metavar="RUN", nargs=None if auditing else "?", help="a run's folder, a path or a URI, or its name")
    cli.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if not auditing:
        parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C or the run's end")
    options = parser.parse_args(sys.argv[2 if auditing else 1 :])
    try:
        options.folder = named(options) if options.folder else _newest(options)
        signs = (audit.LEDGER,) if auditing else (audit.LEDGER, live.LIVE)
        if not any(storage.exists(storage.join(options.folder, sign)) for sign in signs):
            raise cli.JobFailed(f"{options.folder}: no run that has committed a step; it has no {audit.LEDGER}" if auditing else
                                f"{options.folder}: no run that has begun; it has neither {audit.LEDGER} nor {live.LIVE}")
        return _audit(options) if auditing else _status(options)
    except (storage.StorageError, DatasetError) as error:
        raise cli.JobFailed(str(error)) from error


def _description() -> str:
    return __doc__.split("\n\n")[0].replace("python -m jobs.status", cli.program("status"))


# ---- audit

def _audit(options: Namespace) -> int:
    config, started = configuration(options), time.perf_counter()
    data = session.data_path(config)
    dataset = Dataset.open(data)
    found = audit.audit(options.folder, config, dataset)
    seconds, clean = round(time.perf_counter() - started, 3), not found.problems
    if options.json:
        problems = [{"step": p.step, "kind": p.kind, "text": p.text} for p in found.problems]
        print(json.dumps({"run": options.folder, "data": data, "clean": clean, "steps": found.steps, "sequences": found.sequences,
                          "shards_read": found.shards, "seconds": seconds, "problems": problems}))
        return cli.DONE if clean else cli.FAILED
    for problem in found.problems:
        print(problem.text)
    read = (f"{found.steps:,} steps, {found.sequences:,} sequences, {found.shards} of {len(dataset.train.shards)} shards read, "
            f"{seconds} s")
    verdict = "each sequence was used exactly once" if clean else f"{len(found.problems)} problems"
    print(f"audit: {verdict}: {read}")
    return cli.DONE if clean else cli.FAILED


def configuration(options: Namespace) -> RunConfig:
    """The run's own, in the folder where it is now; `--config` and `--set` go before. Raises ConfigError."""
    folder = options.folder.rstrip("/")
    if options.config:
        config = cli.configuration(options)
    elif storage.exists(storage.join(folder, "config.yaml")) or committed_by(_journal(folder, audit.LEDGER)):
        config = parse(yaml.safe_load(storage.read_bytes(storage.join(folder, "config.yaml"))), options.overrides)
    else:  # a run that has not got so far
        config = parse({}, options.overrides)
    parent = folder.rpartition("/")[0] if "://" in folder else os.path.dirname(os.path.abspath(folder))
    return config.model_copy(update={"run": config.run.model_copy(update={"directory": parent})})


# ---- state

def _status(options: Namespace) -> int:
    config = configuration(options)
    while True:
        state = state_of(options.folder, config)
        text = json.dumps(state) if options.json else "\n".join(_lines(state))
        print(f"{_CLEAR if options.watch and sys.stdout.isatty() else ''}{text}", flush=True)
        if not options.watch or state["running"] is False:
            return cli.DONE
        time.sleep(_WATCH_SECONDS)


def named(options: Namespace) -> str:
    """A folder as it is given, or where there is none the newest run of that name in `run.directory`."""
    if "/" in options.folder or storage.is_folder(options.folder):
        return options.folder
    folders = [storage.join(directory, options.folder) for directory in _directories(options)]
    return _touched(folders) or folders[0]


def _directories(options: Namespace) -> list[str]:
    """Where runs may be: as configured; else where those of this folder are, and those of `ray job` of this user."""
    config = cli.configuration(options)
    found = [session.run_directory(config)]
    return found + [os.path.expanduser(session.RUNS_OF_JOBS)] if config.run.directory == "auto" else found


def _newest(options: Namespace) -> str:
    """Raises JobFailed: there is none."""
    directories = _directories(options)
    found = _touched(entry.uri for directory in directories if storage.is_folder(directory) for entry in storage.list_folder(directory))
    if found is None:
        raise cli.JobFailed(f"{' and '.join(directories)}: no run there; name its folder, or --set run.directory=...")
    return found


def _touched(folders: Iterable[str]) -> str | None:
    """The folder whose run did something last; None: no folder has a run."""
    signs = [storage.join(folder, sign) for folder in folders for sign in (audit.LEDGER, live.LIVE)]
    found = [(storage.stat(path).modified, path) for path in signs if storage.exists(path)]
    return max(found)[1].rpartition("/")[0] if found else None


def state_of(folder: str, config: RunConfig) -> dict[str, Any]:
    """What the files say. `running`: whether its coordinator answers, or a process of this host holds it; None where that cannot be
    seen."""
    events = read(audit.json_object(text) for text in _journal(folder, "events.jsonl"))
    metrics = [audit.json_object(text) for text in _journal(folder, audit.METRICS)[-1:]]
    saved = _saved_steps(folder)
    answered = live.ask(folder)
    return {
        "run": folder, "running": _running(folder, answered), "steps_committed": committed_by(_journal(folder, audit.LEDGER)),
        "steps": answered["steps"] if answered else config.training.steps, "newest_step": metrics[0] if metrics else None, "checkpoints": saved,
        "generation": _newest_of(events, kinds.GenerationFormed, kinds.GenerationLoaded),
        "validation": _newest_of(events, kinds.Validated), "last_event": to_json(events[-1]) if events else None, "live": answered,
    }


def _newest_of(events: list[Told], *wanted: Kind) -> dict[str, Any] | None:
    found = _READ.of(events, *wanted)
    return to_json(found[-1]) if found else None


def _lines(state: dict[str, Any]) -> list[str]:
    done, steps, running = state["steps_committed"], state["steps"], state["running"]
    doing = "running" if running else "finished" if done >= steps else "not running" if running is False else "its coordinator does not answer here"
    found = [f"run          {state['run']}: {doing}", f"steps        {done} of {steps} committed"]
    if newest := state["newest_step"]:
        ago = max(0.0, time.time() - newest.get("time", time.time()))
        found.append(f"newest       step {newest['step'] + 1}  loss {newest['loss']:.4f}  "
                     f"{newest['tokens_per_second']:,.0f} tokens/s, {ago:,.0f} s ago")
    if generation := state["generation"]:
        found.append(f"layout       {generation['layout']} (generation {generation['generation']})")
    if validation := state["validation"]:
        found.append(f"validation   {validation['loss']:.4f} after {validation['step']} steps")
    found.append(f"checkpoints  {', '.join(f'step {step}' for step in state['checkpoints']) or 'none'}")
    if state["live"]:
        return found + live.lines(state["live"])
    if event := state["last_event"]:
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
        found.append(f"last event   {event['event']}: {details}")
    return found


def _journal(folder: str, name: str) -> list[str]:
    """Its newest whole lines: it may have millions."""
    uri = storage.join(folder, name)
    if not storage.exists(uri):
        return []
    tail = storage.read_tail(uri, _TAIL_BYTES)
    return tail.decode(errors="replace").split("\n")[1 if len(tail) == _TAIL_BYTES else 0 : -1]


def _saved_steps(folder: str) -> list[int]:
    """Steps of complete checkpoints: those with a manifest."""
    root = storage.join(folder, "checkpoints")
    if not storage.is_folder(root):
        return []
    names = {entry.name: entry.uri for entry in storage.list_folder(root)}
    return sorted(int(match[1]) for name, uri in names.items()
                  if (match := _CHECKPOINT.fullmatch(name)) and storage.exists(storage.join(uri, "manifest.json")))


def _running(folder: str, answered: dict[str, Any] | None) -> bool | None:
    """A run that ended in order has left no address; one whose address does not answer was killed, or runs where we do not see it."""
    if answered:
        return True
    held = _held(folder)
    return None if held is False and storage.exists(storage.join(folder, live.LIVE)) else held


def _held(folder: str) -> bool | None:
    """Whether a process has the run's lock. It is looked for in the kernel's list: trying to take it might refuse a run that
    starts at that moment."""
    try:
        lock = os.stat(os.path.join(folder, ".lock"))
        with open("/proc/locks") as stream:
            inodes = {line.split()[5].rpartition(":")[2] for line in stream if " FLOCK " in line}
    except (OSError, IndexError):
        return None
    return str(lock.st_ino) in inodes


if __name__ == "__main__":
    sys.exit(cli.run(main))
