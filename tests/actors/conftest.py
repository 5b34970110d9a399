from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import runtime
from faults import Company, Stage

from actors.hosts.processes import ProcessRanks

# torch looks up the names of both ends of a TCPStore's connections; a name server that does not answer costs 5 s each
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(scope="session")
def ranks():
    """Four rank processes for the whole session: importing torch takes seconds, forming a new generation milliseconds."""
    config, _ = runtime.configured()
    with ProcessRanks(config, 4, runtime.host, start_method="forkserver") as found:
        yield found


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Four rank processes that may be harmed, and runs on them."""
    config, _ = runtime.configured()
    with Company(config, 4) as company:
        yield Stage(company, tmp_path_factory.mktemp("recovery"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Disk:
    def __init__(self, folder: Path):
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self, leaving: int = 0) -> None:
        """Take all space but `leaving` bytes."""
        with open(self._ballast, "ab", buffering=0) as stream:
            try:
                while stream.write(bytes(4096)):
                    pass
            except OSError:
                pass
            stream.truncate(max(0, stream.tell() - leaving))

    def free(self) -> None:
        self._ballast.unlink()
