"""One thread of another process that stands still, while the others go on: ptrace(2). Needs Linux, and root.

All calls for a thread come from the one thread here that has seized it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Self

_CONT, _DETACH, _SEIZE, _INTERRUPT = 7, 17, 0x4206, 0x4207
_WALL = 0x40000000
_WAITS = {"futex": 202, "poll": 7, "ppoll": 271, "epoll_wait": 232, "epoll_pwait": 281, "clock_nanosleep": 230, "recvfrom": 45,
          "recvmsg": 47}
"""System calls in which a thread of Python does not have the interpreter's lock; their numbers on x86-64."""


def cpu_seconds(pid: int) -> dict[int, float]:
    """Of each thread; none of a process that is gone."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            used = (task / "stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            continue
        found[int(task.name)] = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
    return found


class HeldThread:
    """A context manager. It runs at first, and again at the end. `ended`: it is gone, and its process with it.

    Raises OSError: there is no such thread, or no right to it.
    """

    def __init__(self, pid: int, thread: int):
        self._state, self._thread, self.ended = Path(f"/proc/{pid}/task/{thread}/syscall"), thread, False

    def hold(self) -> bool:
        """Stop it. False: it might have the interpreter's lock, for which all others would wait, and goes on."""
        _ptrace(_INTERRUPT, self._thread)
        self._wait(0)
        if not self.ended and int(self._state.read_text().split()[0]) in _WAITS.values():
            return True
        if not self.ended:
            _ptrace(_CONT, self._thread)
        return False

    def look(self) -> bool:
        """Whether it has ended. A process ends only once whoever holds a thread of it knows."""
        self._wait(os.WNOHANG)
        return self.ended

    def __enter__(self) -> Self:
        _ptrace(_SEIZE, self._thread)
        return self

    def __exit__(self, *exception: object) -> None:
        for request in (_INTERRUPT, _DETACH):
            if not self.ended:
                try:
                    _ptrace(request, self._thread)
                    if request == _INTERRUPT:
                        self._wait(0)
                except ProcessLookupError:  # of a thread that stands still already there is nothing to wait for
                    self.look()

    def _wait(self, options: int) -> None:
        try:
            found, status = os.waitpid(self._thread, options | _WALL)
        except ChildProcessError:
            self.ended = True
            return
        self.ended = self.ended or (found != 0 and not os.WIFSTOPPED(status))


def _ptrace(request: int, thread: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes, call.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    if call(request, thread, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
