"""What a local Ray leaves on the disk."""

from __future__ import annotations

import os
import subprocess
import sys

from jobs import session


def test_folders_of_the_dead_are_deleted_those_of_the_living_are_not(tmp_path, monkeypatch):
    prefix = f"{tmp_path}/dualray-"
    monkeypatch.setattr(session, "_PREFIX", prefix)
    monkeypatch.setattr(session, "_folders", [])
    waits = f"from jobs import session; session._PREFIX = {prefix!r}; print(session._temporary_folder(), flush=True); input()"
    living = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        theirs, ours = living.stdout.readline().strip(), session._temporary_folder()
        assert os.path.isdir(theirs) and os.path.isdir(ours)
        living.kill()
        living.wait()
        again = session._temporary_folder()
        assert sorted(map(str, tmp_path.iterdir())) == sorted([ours, again])
    finally:
        living.kill()
        living.communicate()
        for _, lock in session._folders:
            lock.close()
