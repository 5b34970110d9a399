"""Commands on the head of a cluster of real raylets, and the files of lines that runs leave there."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs.benches.chaos.company import CONFIG, LENGTH
from jobs.benches.shared.raylets import ClusterFailed, RayletCluster

SECONDS = 180.0
"""Bound on what a busy machine takes to start a run, to end it, or to start a raylet."""


def tokens(cluster: RayletCluster, folder: Path) -> str:
    """The data of all runs: a few files of the standard library."""
    inputs = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("c*.py"))
    finished(cluster, folder, "tokenize", "jobs.tokenize", "--input", *inputs, "--tokenizer", "byte",
             "--output", f"{folder}/tokens", "--set", f"data.sequence_length={LENGTH}", "--set", "data.validation_fraction=0.2")
    return f"{folder}/tokens"


def finished(cluster: RayletCluster, folder: Path, name: str, *arguments: str, seconds: float = SECONDS) -> str:
    """`python -m *arguments` on the head, to its end: what it said. Raises ClusterFailed: that is no good one."""
    with open(folder / f"{name}.log", "w") as log:
        process = cluster.start("-m", *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
            process.wait()
    told = (folder / f"{name}.log").read_text()
    if code:
        raise ClusterFailed(f"{' '.join(arguments[:2])}: exit code {code}\n{told[-4000:]}")
    return told


def command_of(folder: Path, data: str, name: str, **sections: Mapping[str, Any]) -> list[str]:
    """Writes the configuration of a run; arguments of `python -m`."""
    tree = {key: {**CONFIG.get(key, {}), **sections.get(key, {})} for key in {*CONFIG, *sections}}
    tree["run"] = {"name": name, "directory": str(folder / "runs"), **sections.get("run", {})}
    tree["data"] = {"sequence_length": LENGTH, "path": data}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["jobs.train", "--config", str(path)]


def drained(address: str, name: str, deadline: float) -> None:
    """What `ray drain-node` says to Ray's control store, of a node by its identity, and from wherever one can reach it. deadline:
    seconds since the epoch. Raises ClusterFailed: it refuses; RayError: it does not answer."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(name, reason, "spot", int(1000 * deadline))
    if not accepted:
        raise ClusterFailed(f"{name} is not drained: {why}")


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def lines(path: Path) -> list[dict]:
    """Of a journal that grows: whole ones."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


class AppendedLines:
    """What was appended to a file of lines since one last looked."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0

    def news(self) -> list[str]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            whole, end, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(end)
        return whole.decode().split("\n") if end else []
