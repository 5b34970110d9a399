"""The Ray side of starting a run: connect, look at the nodes, put one actor on each accelerator."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from typing import IO, Any

from jobs.cli import JobFailed
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.topology import Node, virtual_nodes

CONNECT_TIMEOUT_SECONDS = 10.0
_HOME_OF_JOBS = "~/dualray"
RUNS_OF_JOBS = f"{_HOME_OF_JOBS}/runs"
"""Where runs under `ray job` live unless they are told otherwise: their working directory goes when they end."""
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_memory_monitor_refresh_ms": "0"}
_LOCAL = {"RAY_AUTH_MODE": "disabled"}
_LOCAL_OBJECT_STORE_BYTES = 100_000_000
_PREFIX, _LOCK = "/tmp/dualray-", ".lock"
_MODULES = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
_folders: list[tuple[str, IO[bytes]]] = []  # of the Ray in this process and its lock, until `disconnect`
_requests: list[RunConfig] = []  # for nodes, that this process is to take back: one at most


def under_ray_job() -> bool:
    """Whether this process is the entry point of `ray job submit`, whose working directory is an unpacked copy."""
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, else start Ray in this process."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    local = not os.environ.get("RAY_ADDRESS")
    if not local:
        _require_answer(os.environ["RAY_ADDRESS"])
    else:
        for key, value in _LOCAL.items():
            os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    _silence_ray()
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False,
                               "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    if local:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
                    "_temp_dir": _temporary_folder()}
    ray.init(**options, job_config=_job_config())


def _job_config() -> Any:
    """Ray has its workers look for modules in the driver's working directory first, where an `actors.py` may be that is none of
    ours. They shall look there only if it is where this program's own are."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _OwnFolder()  # what it adds to, when it connects
    return config


class _OwnFolder(list):
    """Takes the folder that this program's modules are in, and no other."""

    def extend(self, folders: Iterable[str]) -> None:
        super().extend(folder for folder in folders if os.path.realpath(folder) == _MODULES)


def _silence_ray() -> None:
    """`log_to_driver` leaves a thread that prints paragraphs about lost processes on standard output; the run's last line
    says what was lost."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes. Raises JobFailed: nothing listens at host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like: Ray looks the address up
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise JobFailed(f"RAY_ADDRESS = {address}: no Ray cluster answers there ({error.strerror or error})") from error


def is_local() -> bool:
    """Whether Ray runs in this process only, and ends with it."""
    return bool(_folders)


def ray_address() -> str:
    """host:port of the control store of the Ray that this process is connected to."""
    import ray

    return ray.get_runtime_context().gcs_address


def disconnect() -> None:
    """Leave the cluster; where Ray ran in this process, end it and delete its files."""
    import ray

    ray.shutdown()
    while _folders:
        folder, lock = _folders.pop()
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _temporary_folder() -> str:
    """For Ray's logs and sockets. Always below /tmp: the path of a socket may have 107 bytes only. What runs that were
    killed have left there is deleted: the locks of the dead are free."""
    for left in glob.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), open(left, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.dirname(left), ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=os.path.basename(_PREFIX), dir=os.path.dirname(_PREFIX))
    lock = open(f"{folder}/{_LOCK}.new", "ab")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(lock.name, f"{folder}/{_LOCK}")  # never there without being held by a process that lives
    _folders.append((folder, lock))
    return folder


def nodes(config: RunConfig) -> tuple[Node, ...]:
    """The nodes that a run can use, each with its ranks. Connected to Ray, unless the nodes are virtual."""
    if config.topology.virtual_nodes:  # without Ray, which takes seconds to import
        return virtual_nodes(config.topology.virtual_nodes, config.topology.ranks_per_node)
    from actors.hosts.cluster import nodes

    return nodes(config)


def ask_for_nodes(config: RunConfig) -> None:
    """Tell an autoscaler, if there is one, how many nodes the run wants."""
    if not config.topology.virtual_nodes:
        from actors.hosts.cluster import ask_for_nodes

        answer_for(config)
        ask_for_nodes(config)


def answer_for(config: RunConfig) -> None:
    """A coordinator asks for nodes in the name of this process, its driver."""
    if not config.topology.virtual_nodes:
        _requests[:] = [config]


def leave_requests() -> None:
    """They are those of a run that goes on without this process."""
    _requests.clear()


def ask_for_no_more() -> None:
    """Take back what this process answers for, and nothing else: Ray keeps one request for the whole cluster, and it may be that
    of another run. Where Ray does not answer any more there is nothing to take back."""
    while _requests:
        config = _requests.pop()
        import ray

        if ray.is_initialized():
            from actors.hosts.cluster import ask_for_no_more

            with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
                ask_for_no_more(config)


def settled(config: RunConfig) -> RunConfig:
    """The configuration with what a rank takes of a node. Connected to Ray, unless the nodes are virtual."""
    if config.topology.virtual_nodes:
        return config
    from actors.hosts.cluster import settled

    return settled(config)


def run_directory(config: RunConfig) -> str:
    """Where runs live. Raises ConfigError: a relative path under `ray job`, whose files go when the job ends."""
    return _shared_path("run.directory", config.run.directory, "runs")


def data_path(config: RunConfig) -> str:
    """The folder of the tokenized data; auto: the built-in corpus, kept beside the runs."""
    corpus = f".data/stdlib-{config.data.sequence_length}"
    if config.data.path == "auto":
        return f"{run_directory(config).rstrip('/')}/{corpus}"
    return _shared_path("data.path", config.data.path, corpus)


def _shared_path(key: str, path: str, under_home: str) -> str:
    if path == "auto":
        return os.path.expanduser(f"{_HOME_OF_JOBS}/{under_home}") if under_ray_job() else os.path.abspath(under_home)
    if "://" in path:
        return path
    if under_ray_job() and not os.path.isabs(os.path.expanduser(path)):
        raise ConfigError(key, path, "an absolute path or a URI under `ray job` (its working directory is a copy), or auto")
    return os.path.abspath(os.path.expanduser(path))
