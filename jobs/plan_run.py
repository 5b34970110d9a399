"""Other schedules for a run that has traced a step, with the durations that the step had."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from orchestrator.config.run_config import ConfigError, RunConfig, load
from orchestrator.plan.compare import Candidate, as_objects, compare, table
from orchestrator.plan.scheduling import schedule_of
from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.stages import SEARCHED
from orchestrator.schedule.kinds.registry import KINDS, TABLE
from orchestrator.schedule.search import searched
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.measured import MeasuredStep, durations_to_plan_with, read_trace, refuse_another_schedule

_TRACE = "trace.json"


def comparison(options: argparse.Namespace) -> str:
    """What `jobs.plan run` prints. The run's own schedule comes first. Raises ConfigError: no such run, step or number."""
    if not math.isfinite(options.hop) or options.hop < 0:
        raise ConfigError("--hop", options.hop, "a finite number (at least 0)")
    config, measured, ran = _step(options.run)
    durations = durations_to_plan_with(measured, ran, options.hop)
    found = [Candidate(f"{ran.kind}, as it ran", ran, durations), *_fixed(ran, durations)]
    print("searching, some seconds ...", file=sys.stderr, flush=True)
    found.append(_best(ran, durations, options.most_activations, splits=config.training.microbatch_sequences > 1))
    results = compare(found)
    settings = {"run": options.run, "step": measured.step, "ranks": ran.positions, "microbatches": ran.microbatches,
                "placement": ran.stages.placement, "hop": options.hop, "measured_milliseconds": measured.makespan,
                "exchange_slowdown": list(durations.exchange_slowdown)}
    if options.json:
        return json.dumps({"settings": settings, **as_objects(results)}) + "\n"
    slow = ", ".join(f"rank {position} communicates {factor:.2f} times as long" for position, factor
                     in enumerate(durations.exchange_slowdown) if factor > 1)
    head = (f"step {measured.step} of {options.run}: {ran.positions} ranks, {ran.microbatches} microbatches, "
            f"{measured.makespan:.4g} ms{'; ' + slow if slow else ''}")
    return (f"{head}; F = a forward on all layers of a rank, without communication; "
            f"makespans are simulated\n\n{table(results)}")


def _step(run: str) -> tuple[RunConfig, MeasuredStep, Schedule]:
    """The configuration of a run, one of its steps, and the schedule that it ran."""
    path, mark, end = run.rpartition("#")
    folder, number = (Path(path), int(end)) if mark and end.isdecimal() else (Path(run), None)
    config = load(str(folder / "config.yaml"))
    try:
        text = (folder / _TRACE).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("run", run, f"the folder of a run with a {_TRACE}, as telemetry.trace_steps makes one "
                                      f"({error.strerror})") from None
    try:
        measured = read_trace(text, config.stages.positions, number)
        ran = schedule_of(config, config.stages, measured.microbatches(config.stages), training=True)
        refuse_another_schedule(measured, ran)
    except ValueError as error:
        raise ConfigError("run", run, str(error)) from None
    return config, measured, ran


def _fixed(ran: Schedule, durations: Durations) -> list[Candidate]:
    """Other kinds that have their stages where the run has them, and take its microbatches."""
    found = []
    for kind in KINDS:
        if kind != ran.kind and TABLE[kind].fits(ran.stages):
            try:
                schedule = TABLE[kind].schedule(ran.stages, ran.microbatches)
            except ConfigError:
                continue
            found.append(Candidate(kind, schedule, durations))
    return found


def _best(ran: Schedule, durations: Durations, most_activations: float | None, *, splits: bool) -> Candidate:
    try:
        found = searched(ran.stages, ran.microbatches, durations, most_activations, splits=splits)
    except ConfigError as error:
        raise ConfigError(f"--{error.key.replace('_', '-')}", error.value, error.allowed) from None
    return Candidate(SEARCHED, found.schedule, durations, found.lower_bound)
