"""Whom a rank obeys, and what it was told to give up. Both only grow, so that what comes late does no harm."""

from __future__ import annotations

import threading

from actors.comm.groups import Generation
from actors.comm.waiting import Aborted


class Superseded(RuntimeError):
    """Told by a coordinator whose place a newer one has taken."""


class Authority:
    """Of one rank; safe from any thread.

    epoch: of the coordinator that is obeyed; 0: of one that does not count them. given_up: the highest generation that was to be
    aborted, begun or not. serving: epoch of the call that the compute thread carries out; None: of one that does not say.
    generation: where the rank takes part at present.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run = ""
        self.epoch = self.given_up = 0
        self.serving: int | None = None
        self.generation: Generation | None = None

    def attached(self, run: str, epoch: int) -> None:
        """A coordinator of this run takes over. Raises Superseded."""
        with self._lock:
            another, self._run = run != self._run, run
            if another or epoch == 0:
                self.epoch, self.given_up = epoch, 0
                return
            self._heed(epoch)

    def heed(self, epoch: int) -> None:
        """A coordinator speaks. One that is newer than all before ends what they have begun, and counts generations on its own.

        Raises Superseded.
        """
        if epoch != self.epoch:
            with self._lock:
                self._heed(epoch)

    def serve(self, epoch: int, generation: int) -> None:
        """The compute thread begins with a call. generation: that the call belongs to; 0: to none. Raises Superseded, Aborted."""
        self.heed(epoch)
        with self._lock:
            self.serving = epoch
            self._check(generation)

    def check(self, generation: int) -> None:
        """Raises Aborted: it was given up. Superseded: whoever asks for it was."""
        with self._lock:
            self._check(generation)

    def enter(self, generation: Generation) -> None:
        """Take part from now on. Raises as `check`."""
        with self._lock:
            self._check(generation.number)
            self.generation = generation

    def renumber(self, number: int) -> None:
        """The present generation goes on as another one. Raises as `check`."""
        with self._lock:
            self._check(number)
            self.generation.number = number

    def leave(self) -> Generation | None:
        """Take part no more. What is to be closed."""
        with self._lock:
            generation, self.generation = self.generation, None
        return generation

    def give_up(self, number: int | None) -> None:
        """End all communication of generations up to this one, and refuse what comes for them later. None: of the present
        one, whatever its number."""
        with self._lock:
            if number is None:
                self._end()
                return
            self.given_up = max(self.given_up, number)
            if self.generation is not None and self.generation.number <= number:
                self._end()

    def _heed(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise Superseded(f"epoch {epoch} is over: this rank obeys epoch {self.epoch}")
        if epoch > self.epoch:
            self.epoch, self.given_up = epoch, 0
            self._end()

    def _check(self, generation: int) -> None:
        if self.serving is not None and self.serving < self.epoch:
            raise Superseded(f"epoch {self.serving} is over: this rank obeys epoch {self.epoch}")
        if 0 < generation <= self.given_up:
            raise Aborted(f"generation {generation} was given up")

    def _end(self) -> None:
        if self.generation is not None:
            self.generation.abort()
