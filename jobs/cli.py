"""What all jobs share on the command line: `--config`, `--set`, exit codes, one-line refusals.

Exit codes: 0 done; 1 failed; 2 bad usage or configuration, with one line on standard error that names key, value and what is
allowed; 130 interrupted. An exception that nobody foresaw keeps its traceback (and exits 1).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO, TypeVar

from jobs import command, interrupted, packaged
from orchestrator.config.run_config import ConfigError, RunConfig, load

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
T = TypeVar("T")


class JobFailed(Exception):
    """The job could not do what it was asked to. `str()`: the one line that the user sees."""


class UsageError(Exception):
    """The command line is wrong. `str()`: the one line that the user sees."""


class _TimeOver(Exception):
    """The alarm of `within`."""


def within(seconds: float) -> Callable[[Callable[[], T]], T | None]:
    """Calls what it is given; None: that took longer. For the main thread only, which an alarm interrupts."""
    def alarm(*_: object) -> NoReturn:
        raise _TimeOver

    def bounded(work: Callable[[], T]) -> T | None:
        before = signal.signal(signal.SIGALRM, alarm)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                return work()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TimeOver:
            return None
        finally:
            signal.signal(signal.SIGALRM, before)

    return bounded


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; sub-parsers are of the same class.

    examples: arguments that a person may want to give, which the help ends with.
    """

    def __init__(self, *args, examples: tuple[str, ...] = (), **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._examples = examples

    def format_help(self) -> str:
        shown = "".join(f"  {self.prog} {example}\n" for example in self._examples)
        return super().format_help() + (f"\nexamples:\n{shown}" if shown else "")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def program(job: str) -> str:
    """How this job is called, as it was."""
    return f"{command.NAME} {job}" if os.path.basename(sys.argv[0]) == command.NAME else f"python -m jobs.{job}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every job takes."""
    parser.add_argument("--config", metavar="FILE", help="run configuration in YAML, or the name of one that comes along; "
                        "without it, all defaults")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
                        help="override one setting, as section.key=value; repeatable")


def configuration(options: argparse.Namespace) -> RunConfig:
    """The configuration that `arguments` named. Raises ConfigError."""
    return load(options.config and packaged.configuration_file(options.config), options.overrides)


def run(main: Callable[[], int | None]) -> int:
    """Run a job's `main` and turn what it raises into an exit code: `sys.exit(run(main))`.

    A reader of our output that goes away (`| head`) ends the job quietly, as failed: it did not finish.
    """
    try:
        if signal.getsignal(signal.SIGINT) is interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main() or DONE
        sys.stdout.flush()
        return code
    except (ConfigError, UsageError) as error:
        return _refuse(error, REFUSED)
    except JobFailed as error:
        return _refuse(error, FAILED)
    except KeyboardInterrupt:
        return _refuse("interrupted", INTERRUPTED)
    except BrokenPipeError:
        if not _reader_gone():
            raise
        return FAILED


def discard(stream: TextIO) -> None:
    """What is left in it, and what follows: nobody can read it any more, and the interpreter would complain at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _reader_gone() -> bool:
    """Whether it is standard output that is broken; if so, what is left in it is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    discard(sys.stdout)
    return True


def _refuse(reason: object, code: int) -> int:
    print(" ".join(str(reason).splitlines()), file=sys.stderr)
    return code
