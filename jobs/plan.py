"""Look at what a run would do, without running it.

python -m jobs.plan schedule --kind dualpipe --ranks 8 --microbatches 20 --format csv|json|svg [--output FILE]
    The pipeline schedule: what each rank runs, in which order, and how long it takes if a forward takes 1 and a full
    backward 2. csv: a line per rank; json: with times, bubble, peak activations; svg: a picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import JobFailed, Parser, arguments, configuration, run
from orchestrator.config import ConfigError
from orchestrator.schedule.actions import Schedule, to_csv
from orchestrator.schedule.dualpipe import smallest_microbatches
from orchestrator.schedule.kinds import GENERATORS, generate
from orchestrator.schedule.render import as_json, svg
from orchestrator.schedule.simulate import simulate

FORMATS = {
    "csv": to_csv,
    "json": lambda schedule: as_json(schedule, simulate(schedule)) + "\n",
    "svg": lambda schedule: svg(schedule, simulate(schedule)),
}
FLAGS = {"kind": "--kind", "positions": "--ranks", "microbatches": "--microbatches"}


def main(argv: list[str] | None = None) -> None:
    """Raises ConfigError, UsageError: refused. JobFailed: the output cannot be written."""
    options = _parser().parse_args(argv)
    options.job(options)


def _parser() -> Parser:
    parser = Parser(prog="python -m jobs.plan", description="Look at what a run would do, without running it.")
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    _add_schedule(subcommands)
    return parser


def _add_schedule(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser("schedule", help="the order of work of every pipeline rank")
    arguments(parser)
    parser.add_argument("--kind", help=f"{', '.join(GENERATORS)} (default: schedule.kind)")
    parser.add_argument("--ranks", type=int, metavar="N", help="pipeline positions (default: layout.pipeline)")
    parser.add_argument("--microbatches", type=int, metavar="M", help="per step, both directions (default: the fewest)")
    parser.add_argument("--format", choices=tuple(FORMATS), default="csv")
    parser.add_argument("--output", metavar="FILE", help="default: standard output")
    parser.set_defaults(job=show_schedule)


def show_schedule(options: argparse.Namespace) -> None:
    _write(FORMATS[options.format](_schedule(options)), options.output)


def _schedule(options: argparse.Namespace) -> Schedule:
    config = configuration(options)
    kind = config.schedule.kind if options.kind is None else options.kind
    ranks = config.layout.pipeline if options.ranks is None else options.ranks
    microbatches = smallest_microbatches(ranks, 1) if options.microbatches is None else options.microbatches
    try:
        return generate(kind, ranks, microbatches)
    except ConfigError as error:
        raise ConfigError(FLAGS[error.key], error.value, error.allowed) from None


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
