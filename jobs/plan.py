"""Look at what a run would do, without running it.

python -m jobs.plan schedule --kind dualpipe --ranks 8 --microbatches 20 --format csv|json|svg|trace [--output FILE]
    The pipeline schedule, lowered and checked: what each rank runs, in which order, and when. csv: a line per rank; json: with times, bubble,
    exposed communication, peak activations; svg: a picture; trace: for Perfetto. Durations are of one microbatch on all layers
    of a rank: a forward takes 1 and a full backward 2 unless told, without communication. With --measured, a step of a run's
    trace.json is shown beside the simulation, which then has its mean durations, in milliseconds.

python -m jobs.plan compare --ranks 8 --microbatches 32 [--communication 0.913] [--hop 0] [--json]
    All kinds side by side: makespan, bubble, exposed communication, activations, parameters, messages.

python -m jobs.plan run runs/NAME[#STEP] [--hop MILLISECONDS] [--json]
    What a run that has traced a step (telemetry.trace_steps) would gain from another schedule of the same stages: kinds and a
    search, all with the step's measured durations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jobs.cli import JobFailed, Parser, arguments, configuration, program, run, within
from jobs.plan_run import comparison
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.plan.compare import as_objects, compare, contestants, searched_contestants, table
from orchestrator.plan.scheduling import proven
from orchestrator.schedule.ir.actions import Schedule, to_csv
from orchestrator.schedule.ir.stages import PLACEMENTS, SEARCHED, Stages
from orchestrator.schedule.kinds.registry import TABLE, kind_of
from orchestrator.schedule.pictures.render import as_json, svg
from orchestrator.schedule.pictures.trace import schedule_trace
from orchestrator.schedule.search import searched
from orchestrator.schedule.timing.durations import UNIT, Durations, per_chunk, with_communication
from orchestrator.schedule.timing.measured import MeasuredStep, measured_durations, read_trace, refuse_another_schedule
from orchestrator.schedule.timing.simulate import Timeline, simulate


@dataclass(frozen=True)
class Shown:
    """What is to be shown. measured: a step of a run, if one is."""

    schedule: Schedule
    durations: Durations
    measured: MeasuredStep | None = None

    def timeline(self) -> Timeline:
        return simulate(self.schedule, self.durations)


FORMATS = {
    "csv": lambda shown: to_csv(shown.schedule),
    "json": lambda shown: as_json(shown.schedule, shown.timeline(), shown.measured) + "\n",
    "svg": lambda shown: svg(shown.schedule, shown.timeline(), shown.measured),
    "trace": lambda shown: schedule_trace(shown.timeline().lanes, shown.measured) + "\n",
}
FLAGS = {"kind": "--kind", "positions": "--ranks", "microbatches": "--microbatches", "chunks": "--chunks",
         "placement": "--placement", "most_activations": "--most-activations"}
COSTS = {"forward": "--forward", "backward_input": "--backward-input", "backward_weight": "--backward-weight",
         "communication": "--communication", "hop": "--hop", "layers": "--layers"}
COMMON = ("communication", "hop", "layers")
"""Costs that `compare` takes too."""
_LARGEST = 1e12
CHECK_SECONDS = 60.0
_SCHEDULE_EXAMPLES = ("--kind dualpipe --ranks 8 --microbatches 20", "--config tiny --format svg --output tiny.svg")
_COMPARE_EXAMPLES = ("--ranks 8 --microbatches 32 --communication 0.913", "--ranks 4 --microbatches 8 --json")
_RUN_EXAMPLES = ("runs/tiny", "runs/tiny#50 --json")


def main(argv: list[str] | None = None) -> None:
    """Raises ConfigError, UsageError: refused. JobFailed: the output cannot be written."""
    options = _parser().parse_args(argv)
    options.job(options)


def _parser() -> Parser:
    parser = Parser(prog=program("plan"), description="Look at what a run would do, without running it.",
                    examples=(f"schedule {_SCHEDULE_EXAMPLES[0]}", f"compare {_COMPARE_EXAMPLES[0]}"))
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    _add_schedule(subcommands)
    _add_compare(subcommands)
    _add_run(subcommands)
    return parser


def _add_schedule(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser("schedule", help="the order of work of every pipeline rank", examples=_SCHEDULE_EXAMPLES)
    arguments(parser)
    parser.add_argument("--kind", help="; ".join(f"{kind.name} ({kind.meaning})" for kind in TABLE.values())
                        + " (default: schedule.kind)")
    parser.add_argument("--ranks", type=int, metavar="N", help="pipeline positions (default: layout.pipeline)")
    parser.add_argument("--microbatches", type=int, metavar="M",
                        help="per step, all directions (default: the fewest from twice the ranks on, or those of --measured)")
    parser.add_argument("--chunks", type=int, metavar="V", help="stages of a rank that a microbatch passes, of interleaved kinds")
    parser.add_argument("--placement", help=f"{', '.join(PLACEMENTS)}: how {SEARCHED} folds the stages")
    parser.add_argument("--most-activations", type=_number, metavar="N",
                        help=f"bound of {SEARCHED}: microbatches that a rank keeps, on all its layers")
    parser.add_argument("--forward", type=float, metavar="TIME",
                        help=f"duration on all layers of a rank (default: 1; with {SEARCHED}, as of the others, schedule.costs)")
    parser.add_argument("--backward-input", type=float, metavar="TIME", help="default: 1")
    parser.add_argument("--backward-weight", type=float, metavar="TIME", help="default: 1")
    _add_common_costs(parser)
    parser.add_argument("--measured", metavar="TRACE.json[#STEP]", help="show a step of a run beside the simulation")
    parser.add_argument("--format", choices=tuple(FORMATS), default="csv")
    parser.add_argument("--output", metavar="FILE", help="default: standard output")
    parser.set_defaults(job=show_schedule)


def _add_compare(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser("compare", help="all kinds of schedules side by side", examples=_COMPARE_EXAMPLES)
    parser.add_argument("--ranks", type=int, metavar="N", default=8)
    parser.add_argument("--microbatches", type=int, metavar="M", default=32, help="per step, all directions")
    _add_common_costs(parser)
    parser.add_argument("--most-activations", type=_number, metavar="N",
                        help=f"bound of the freest {SEARCHED} schedule: microbatches that a rank keeps, on all its layers "
                             "(default: ranks + 2)")
    parser.add_argument("--json", action="store_true", help="for a program")
    parser.add_argument("--output", metavar="FILE", help="default: standard output")
    parser.set_defaults(job=show_comparison)


def _add_run(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser("run", help="other schedules of a run's stages, with the durations that it measured",
                                    examples=_RUN_EXAMPLES)
    parser.add_argument("run", metavar="FOLDER[#STEP]", help="of a run with a trace.json (default: its last step)")
    parser.add_argument("--hop", type=float, metavar="MILLISECONDS", default=0.0, help="from one rank to another (default: 0)")
    parser.add_argument("--most-activations", type=_number, metavar="N",
                        help="bound of the search: microbatches that a rank keeps, on all its layers")
    parser.add_argument("--json", action="store_true", help="for a program")
    parser.add_argument("--output", metavar="FILE", help="default: standard output")
    parser.set_defaults(job=show_run)


def _number(text: str) -> float:
    """A whole number stays one. Raises ValueError: it is none."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _add_common_costs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--communication", type=float, metavar="RATIO",
                        help="of dispatch and combine to compute, over forward and backward (default: 0)")
    parser.add_argument("--layers", type=int, metavar="N",
                        help=f"of a rank, each with a dispatch and a combine (default: {UNIT.layers}; "
                             f"of `schedule` with {SEARCHED}, the model's)")
    parser.add_argument("--hop", type=float, metavar="TIME", help="from one rank to another (default: 0)")


# --- schedule ------------------------------------------------------------------------------------------------------


def show_schedule(options: argparse.Namespace) -> None:
    _write(FORMATS[options.format](_shown(options)), options.output)


def _shown(options: argparse.Namespace) -> Shown:
    config = configuration(options)
    try:
        stages, measured = _stages(options, config), None
        if options.measured is not None:
            measured = _measured(options, stages)
        microbatches = options.microbatches
        if microbatches is None:
            microbatches = measured.microbatches(stages) if measured else _fewest(options, config, stages)
        costs = per_chunk(_costs(options, config), stages)
        schedule = _schedule(options, config, stages, microbatches, costs)
        if within(CHECK_SECONDS)(partial(proven, schedule)) is None:
            print(f"not checked: to lower and check this schedule takes more than {CHECK_SECONDS:g} s", file=sys.stderr)
    except ConfigError as error:
        raise ConfigError(FLAGS.get(error.key, error.key), error.value, error.allowed) from None
    if measured is None:
        return Shown(schedule, costs)
    try:
        refuse_another_schedule(measured, schedule)
    except ValueError as error:
        raise ConfigError("--measured", options.measured, str(error)) from None
    return Shown(schedule, measured_durations(measured, schedule, costs.hop), measured)


def _kind(options: argparse.Namespace, config: RunConfig) -> str:
    return config.schedule.kind if options.kind is None else options.kind


def _choice(options: argparse.Namespace, config: RunConfig, name: str) -> int | str | None:
    """A flag, or what the configuration says about the same kind; None: neither."""
    if (given := getattr(options, name)) is not None:
        return given
    found = getattr(config.schedule, name)
    return None if found == "auto" or _kind(options, config) != config.schedule.kind else found


def _stages(options: argparse.Namespace, config: RunConfig) -> Stages:
    """Where the kind's stages live. Raises ConfigError for what it does not take, before anything is computed."""
    kind = kind_of(_kind(options, config))
    ranks = config.layout.pipeline if options.ranks is None else options.ranks
    for name, taken in (("placement", kind.stage_placement is None), ("most_activations", kind.searched)):
        if getattr(options, name) is not None and not taken:
            raise ConfigError(name, getattr(options, name), f"only --kind {SEARCHED} takes it")
    return kind.stages(ranks, _choice(options, config, "chunks"), _choice(options, config, "placement"))


def _schedule(options: argparse.Namespace, config: RunConfig, stages: Stages, microbatches: int, costs: Durations) -> Schedule:
    kind = kind_of(_kind(options, config))
    if kind.searched:
        found = searched(stages, microbatches, costs, most_activations=_choice(options, config, "most_activations"),
                         splits=config.training.microbatch_sequences > 1)
        print(f"{kind.name}: makespan {found.makespan:.6g}, {100 * found.distance:.1f} % above {found.lower_bound:.6g}, which no "
              f"schedule of this placement ({stages.placement}) and memory is below; {_described(costs)}", file=sys.stderr)
        return found.schedule
    return kind.schedule(stages, microbatches)


def _described(costs: Durations) -> str:
    """What a stage takes, as the search was told."""
    values = {"F": costs.forward, "I": costs.backward_input, "W": costs.backward_weight, "dispatch": costs.dispatch,
              "combine": costs.combine, "hop": costs.hop}
    return "costs of a stage: " + ", ".join(f"{name} {value:g}" for name, value in values.items())


def _fewest(options: argparse.Namespace, config: RunConfig, stages: Stages) -> int:
    """Enough to see the steady state: two for each rank, or more if the kind wants more."""
    return kind_of(_kind(options, config)).smallest_microbatches(stages, 2 * stages.positions)


def _costs(options: argparse.Namespace, config: RunConfig) -> Durations:
    """Of a whole rank. Where there is no flag: those of `schedule.costs` if they decide the order (searched), else unit costs."""
    given = {name: getattr(options, name) for name in COSTS if getattr(options, name) is not None}
    if options.measured is not None and (other := given.keys() - {"hop", "layers"}):
        name = next(name for name in COSTS if name in other)
        raise ConfigError(COSTS[name], given[name], "not with --measured, whose durations are used")
    usual = UNIT
    if kind_of(_kind(options, config)).searched:
        layers = max(1, config.model.num_hidden_layers // (options.ranks or config.layout.pipeline))
        usual = Durations(**config.schedule.costs.model_dump(), layers=layers)
    return _durations(usual, given)


def _durations(usual: Durations, given: dict[str, float]) -> Durations:
    """`usual`, where `given` does not say otherwise. Raises ConfigError: a cost that is none."""
    for name, value in given.items():
        least = "at least 0" if name in ("communication", "hop") else "above 0"
        if math.isfinite(value) and value > _LARGEST:
            raise ConfigError(COSTS[name], value, f"at most {_LARGEST:g}")
        if not math.isfinite(value) or value < 0 or (value == 0 and least == "above 0"):
            raise ConfigError(COSTS[name], value, f"a finite number ({least})")
    ratio = given.get("communication")
    durations = replace(usual, **{name: value for name, value in given.items() if name != "communication"})
    return durations if ratio is None else with_communication(durations, ratio)


def _measured(options: argparse.Namespace, stages: Stages) -> MeasuredStep:
    """The step that `--measured` names."""
    name, number = options.measured, None
    if options.format == "csv":
        raise ConfigError("--measured", name, f"with --format {', '.join(f for f in FORMATS if f != 'csv')}; csv has no times")
    path, mark, end = name.rpartition("#")
    if mark and end.isdecimal():
        name, number = path, int(end)
    try:
        return read_trace(Path(name).read_text(encoding="utf-8"), stages.positions, number)
    except OSError as error:
        raise ConfigError("--measured", options.measured, f"a readable trace ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError("--measured", options.measured, str(error)) from None


# --- compare -------------------------------------------------------------------------------------------------------


def show_comparison(options: argparse.Namespace) -> None:
    if options.most_activations is None:
        options.most_activations = options.ranks + 2
    for name in ("ranks", "microbatches", "most_activations"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "at least 1")
    given = {name: getattr(options, name) for name in COMMON if getattr(options, name) is not None}
    durations = _durations(UNIT, given)
    found, refused = contestants(options.ranks, options.microbatches, durations)
    print("searching twice, some seconds each ...", file=sys.stderr, flush=True)
    best, not_found = searched_contestants(options.ranks, options.microbatches, durations, options.most_activations)
    results, refused = compare([*found, *best]), [*refused, *not_found]
    settings = {"ranks": options.ranks, "microbatches": options.microbatches,
                "communication": options.communication or 0.0, "hop": options.hop or 0.0}
    if options.json:
        _write(json.dumps({"settings": settings, **as_objects(results, refused)}) + "\n", options.output)
    else:
        head = ", ".join(f"{value} {name}" if name in ("ranks", "microbatches") else f"{name} {value:g}"
                         for name, value in settings.items())
        _write(f"{head}; F = a forward on all layers of a rank\n\n{table(results, refused)}", options.output)


# --- run -----------------------------------------------------------------------------------------------------------


def show_run(options: argparse.Namespace) -> None:
    _write(comparison(options), options.output)


def _write(text: str, path: str | None) -> None:
    if path is None:
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise JobFailed(f"--output = {path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(run(main))
