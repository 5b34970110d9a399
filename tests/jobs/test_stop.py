"""What jobs.stop makes of a run's folder. Without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from actors.files.run_folder import RunFolder
from actors.state import checkpoint
from jobs import stop
from jobs.driver import session
from orchestrator.config.run_config import ConfigError


@pytest.fixture
def saved(tmp_path):
    """A run of so many steps, with checkpoints of some."""
    def make(*steps: int) -> RunFolder:
        folder = RunFolder(str(tmp_path), "tiny")
        folder.ledger()
        for step in range(max(steps)):
            folder.append({"step": step, "generation": 1})
        for step in steps:
            checkpoint.commit(checkpoint.folder(folder.checkpoints, step), checkpoint.Manifest(step, {}, "float32", ()))
        return folder
    return make


def test_a_folder_in_the_working_directory_is_read_there(saved, tmp_path, monkeypatch):
    saved(4)
    monkeypatch.chdir(tmp_path)
    assert stop._left("tiny") == stop._left("tiny/") == stop._left(f"{tmp_path}/tiny") == "stopped: saved after step 4"


@pytest.mark.parametrize("damaged, left", [(2, "saved after step 4"), (4, "saved after step 2; 4 were done")])
def test_a_checkpoint_that_is_damaged_does_not_count(saved, damaged, left):
    folder = saved(2, 4)
    Path(checkpoint.folder(folder.checkpoints, damaged), "manifest.json").write_text("{")
    assert stop._left(folder.path) == f"stopped: {left}"


def test_a_run_whose_configuration_was_never_written_can_be_stopped(saved, monkeypatch, capsys):
    folder = saved(4)
    folder.write("live.json", '{"ray": "here", "actors": "tiny"}')
    monkeypatch.setattr(stop, "_connect", lambda *_: None)
    monkeypatch.setattr(session, "disconnect", lambda: None)
    monkeypatch.setattr(stop, "stop", lambda folder, actors, config, now: f"{actors}: {config.elastic.storage_seconds:g}")
    monkeypatch.setattr(sys, "argv", ["stop", folder.path, "--set", "elastic.storage_seconds=7"])
    assert stop.main() == 0 and capsys.readouterr().out == "tiny: 7\n"
    monkeypatch.setattr(sys, "argv", ["stop", folder.path, "--set", "elastic.storage_seconds=soon"])
    with pytest.raises(ConfigError):
        stop.main()
