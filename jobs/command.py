"""`dualray JOB ...`: the same as `python -m jobs.JOB ...`, but that the working directory is not looked into for modules.

Imports nothing but the job that is asked for.
"""

from __future__ import annotations

import importlib
import sys

from jobs import end_when_interrupted

NAME = "dualray"
JOBS = {
    "train": "train a model on a Ray cluster, or on this machine",
    "tokenize": "turn text into the corpus that training reads",
    "plan": "look at a schedule, compare schedules, or find a better one for a run",
    "status": "where a run stands; with `audit`, proof of which sequences it used",
    "stop": "save and end a run that is under way",
    "evaluate": "score a checkpoint on held-out text",
    "export": "write a checkpoint as others load it (Hugging Face's form)",
    "bench": "measure against peers and bounds",
    "config": "what each key of the configuration means; files that come along",
}
_REFUSED = 2


def main() -> int:
    """The job's exit code; 2: there is no such job."""
    end_when_interrupted()
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(_help())
        return 0
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in JOBS:
        said = "which command?" if name is None else f"{name!r} is no command;"
        print(f"{NAME}: {said} there are {', '.join(JOBS)}", file=sys.stderr)
        return _REFUSED
    del sys.argv[1]
    job = importlib.import_module(f"jobs.{name}")
    from jobs import cli

    return cli.run(job.main)


def _help() -> str:
    width = max(map(len, JOBS))
    return "\n".join(["usage: dualray COMMAND ...", "", "Elastic training of mixture-of-experts models on Ray.", "", "commands:",
                      *(f"  {name:<{width}}  {line}" for name, line in JOBS.items()), "",
                      "`dualray COMMAND --help` says more, with examples; `python -m jobs.COMMAND` is the same."])
