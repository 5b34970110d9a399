"""What can be done to processes and to the disk that the chaos bench's runs have."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_DISK_BYTES = 96 << 20
_PAGE_BYTES = 4096


class Stops:
    """Processes that are stopped go on when nobody stops them any more."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), Counter()

    def stop(self, pids: Iterable[int]) -> list[int]:
        """Those to `go_on` with."""
        with self._lock:
            found = [pid for pid in pids if send(pid, signal.SIGSTOP)]
            self._count.update(found)
        return found

    def go_on(self, pids: Iterable[int]) -> None:
        with self._lock:
            for pid in pids:
                self._count[pid] -= 1
                if not self._count[pid]:
                    send(pid, signal.SIGCONT)


def send(pid: int, number: signal.Signals) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Disk:
    """A file system of its own at `folder`, until `close`, which leaves its files there."""

    def __init__(self, folder: Path):
        self._folder, self._ballast = folder, folder / ".ballast"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)], check=True)

    def fill(self) -> None:
        """To the last page."""
        with open(self._ballast, "ab") as stream:
            size, end = _DISK_BYTES, 0
            while size >= _PAGE_BYTES:
                try:
                    os.posix_fallocate(stream.fileno(), end, size)
                    end += size
                except OSError:
                    size //= 2

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        if not self._folder.is_mount():
            return
        self.free()
        kept = Path(tempfile.mkdtemp(dir=self._folder.parent, prefix=".kept-"))
        with contextlib.suppress(OSError, shutil.Error):  # somebody may still write
            shutil.copytree(self._folder, kept, dirs_exist_ok=True)
        subprocess.run(["umount", "-l", str(self._folder)], check=True)
        shutil.rmtree(self._folder)
        kept.chmod(0o755)
        kept.rename(self._folder)
