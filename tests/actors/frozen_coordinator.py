"""A run in a process of its own, which may be frozen. Prints two lines of JSON: before step 3, whose processes there are, and
waits for a line to come; and what has become of the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from faults import QUICK, STEPS, Company, Stage
from runtime import Run, configured
from sabotage import lost, once


def pids(company: Company) -> dict[str, int]:
    return {str(member): company.pid_of(member) for member in company._of_member}


def say(values: dict) -> None:
    print(json.dumps(values), flush=True)


def main(folder: Path) -> None:
    with Company(configured("EP4")[0], 4) as company:
        def wait() -> None:
            say(pids(company))
            sys.stdin.readline()

        run: Run = Stage(company, folder).run("EP4", *QUICK, STEPS, "elastic.silence_seconds=1.5", before=once({3: wait}))
        say({"error": None if run.error is None else str(run.error), "lost": lost(run), "pids": pids(company),
             "losses": [(step["step"], step["loss"]) for step in run.steps]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
