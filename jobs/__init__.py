"""What a person starts, as `dualray NAME` or `python -m jobs.NAME`.

Until `cli.run` minds it, while modules are imported, Ctrl-C ends it in one line.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def interrupted(number: int, frame: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def end_when_interrupted() -> None:
    """Unless somebody has said what Ctrl-C does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


if sys.argv[:1] == ["-m"]:  # Python is looking for the job
    end_when_interrupted()
