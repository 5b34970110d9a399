"""What a person sees while a run goes: one live line on a terminal, plain lines otherwise.

Nobody who shows something waits for it to be seen: a terminal may be stopped (Ctrl-S, a pager), and a driver that waits for it is
not heard by its coordinator. Nor does what cannot be shown end anything.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections import deque
from typing import Any, TextIO

from jobs import cli
from orchestrator.told.lines import Told, details

_PLAIN_SECONDS = 5.0
_MOST_TEXTS = 10_000
"""As many as a coordinator keeps."""


class Progress:
    """Writes to `stream`, on a thread of its own, until the `with` block ends, which waits for what is left. Without a terminal a
    step is told every few seconds, the first and the last one always.

    If the stream takes nothing for long, the oldest is left out; if it fails, that is said on standard error, and nothing is
    shown from then on.
    """

    def __init__(self, steps: int, stream: TextIO = sys.stdout):
        self._steps, self._stream = steps, stream
        self._live = stream.isatty()
        self._told_at, self._held = 0.0, None
        self._texts: deque[str] = deque(maxlen=_MOST_TEXTS)
        self._wanted = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="progress", daemon=True)
        self._thread.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self._wanted.release()
        self._thread.join()

    def step(self, values: dict[str, Any]) -> None:
        line = (f"step {values['step'] + 1}/{self._steps}  loss {values['loss']:.4f}  "
                f"{values['tokens_per_second']:,.0f} tokens/s  overlap {values['overlap_ratio']:.0%}  "
                f"bubble {values['bubble_ratio']:.0%}  nodes {values['nodes']}")
        last = values["step"] + 1 == self._steps
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + line[:width].ljust(width))
        elif last or time.monotonic() - self._told_at >= _PLAIN_SECONDS:
            self._told_at, self._held = time.monotonic(), None
            self._write(f"{line}\n")
        else:
            self._held = line

    def say(self, text: str) -> None:
        """A line that stays."""
        before = "\r\x1b[K" if self._live else ""
        if self._held is not None:
            before, self._held = f"{self._held}\n", None
        self._write(f"{before}{text}\n")

    def event(self, told: Told) -> None:
        """Of any kind."""
        text = "  ".join(f"{key} {_short(value)}" for key, value in details(told.event).items() if value is not None)
        self.say(f"{told.name.replace('_', ' ')}: {text}")

    def _write(self, text: str) -> None:
        self._texts.append(text)
        self._wanted.release()

    def _write_all(self) -> None:
        while self._texts or not self._closed:
            self._wanted.acquire()
            text = "".join(self._texts.popleft() for _ in range(len(self._texts)))
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError) as error:
                cli.discard(self._stream)
                with contextlib.suppress(OSError, ValueError):
                    print(f"nothing more is shown: {error}", file=sys.stderr, flush=True)
                return


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
