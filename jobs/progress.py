"""What a person sees while a run goes: one live line on a terminal, plain lines otherwise."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

_PLAIN_SECONDS = 5.0


class Progress:
    """Writes to `stream`. Without a terminal a step is told every few seconds, the first and the last one always."""

    def __init__(self, steps: int, stream: TextIO = sys.stdout):
        self._steps, self._stream = steps, stream
        self._live = stream.isatty()
        self._told_at, self._held = 0.0, None

    def step(self, values: dict[str, Any]) -> None:
        line = (f"step {values['step'] + 1}/{self._steps}  loss {values['loss']:.4f}  "
                f"{values['tokens_per_second']:,.0f} tokens/s  overlap {values['overlap_ratio']:.0%}  "
                f"bubble {values['bubble_ratio']:.0%}  nodes {values['nodes']}")
        last = values["step"] + 1 == self._steps
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width].ljust(width))
            self._stream.flush()
        elif last or time.monotonic() - self._told_at >= _PLAIN_SECONDS:
            self._told_at, self._held = time.monotonic(), None
            print(line, file=self._stream, flush=True)
        else:
            self._held = line

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._stream.write("\r\x1b[K")
        elif self._held is not None:
            print(self._held, file=self._stream)
            self._held = None
        print(text, file=self._stream, flush=True)

    def event(self, values: dict[str, Any]) -> None:
        details = "  ".join(f"{key} {_short(value)}" for key, value in values.items() if key not in ("time", "event") and value is not None)
        self.say(f"{values['event'].replace('_', ' ')}: {details}")


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
