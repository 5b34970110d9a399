"""What a person starts, as `dualray NAME` or `python -m jobs.NAME`. Until `cli.run` minds it, while modules are imported, Ctrl-C ends it in one line."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def interrupted(number: int, frame: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


COMMAND = "dualray"
if (sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == COMMAND) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)
