"""What a local Ray leaves on the disk, and whose request for nodes is taken back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from actors.hosts import cluster
from jobs.driver import session
from orchestrator.config.run_config import parse
from tests.cluster import REPOSITORY


def test_folders_of_the_dead_are_deleted_those_of_the_living_are_not(tmp_path, monkeypatch):
    prefix = f"{tmp_path}/dualray-"
    monkeypatch.setattr(session, "_PREFIX", prefix)
    monkeypatch.setattr(session, "_folders", [])
    waits = f"from jobs.driver import session; session._PREFIX = {prefix!r}; print(session._temporary_folder(), flush=True); input()"
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


def test_workers_look_for_modules_in_this_programs_folder_or_in_none_that_is_named(monkeypatch, tmp_path):
    """Of the folders that Ray adds: the script's, and the working directory."""
    given = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.append(options["job_config"]))
    monkeypatch.setattr(session, "_QUIET", {})
    monkeypatch.setattr(session, "_silence_ray", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    session.connect()
    paths = given[0]._py_driver_sys_path
    (tmp_path / "link").symlink_to(REPOSITORY)
    paths.extend([str(tmp_path), str(REPOSITORY / "jobs"), f"{tmp_path}/link", str(REPOSITORY)])
    assert paths == [f"{tmp_path}/link", str(REPOSITORY)]


@pytest.fixture
def withdrawn(monkeypatch):
    """For whom nodes were asked for no more."""
    found = []
    monkeypatch.setattr(session, "_requests", [])
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "ask_for_nodes", lambda config: None)
    monkeypatch.setattr(cluster, "ask_for_no_more", found.append)
    return found


def test_a_process_takes_back_what_it_has_asked_for_and_once(withdrawn):
    config = parse({}, [])
    session.ask_for_nodes(config)
    session.answer_for(config)
    session.ask_for_no_more()
    session.ask_for_no_more()
    assert withdrawn == [config]


def test_a_process_that_has_not_asked_or_whose_run_goes_on_takes_nothing_back(withdrawn):
    """Ray keeps one request for the whole cluster: a start that is refused would take back that of the run under way."""
    session.ask_for_no_more()
    session.ask_for_nodes(parse({}, []))
    session.leave_requests()
    session.ask_for_no_more()
    session.ask_for_nodes(parse({}, ["topology.virtual_nodes=2", "topology.ranks_per_node=1"]))
    session.ask_for_no_more()
    assert withdrawn == []
