"""Tokens a second of the whole system (Ray, feed, coordinator, four ranks) against plain PyTorch on the same cores.

Both train the same model on batches of the same shape, in turn, in one run. Ray is not up while the peer runs.
`--option float8=true` compares the system in FP8 with itself in BF16 instead: on CPUs, what emulation costs.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from pydantic import Field

from actors.calls.messages import Failure
from actors.data.batching import Batch
from actors.files.run_folder import RunFolder
from jobs import corpus
from jobs.benches.shared import plain
from jobs.benches.shared.text import batches_of_text
from jobs.cli import JobFailed
from jobs.driver import session
from orchestrator.config.precision import PRODUCTS
from orchestrator.config.run_config import RunConfig, Section, parse
from orchestrator.layout.layout import choose
from orchestrator.protocol.members import Member

ROUNDS, STEPS, WARM_UP = 3, 16, 4
_TIMEOUT_SECONDS = 900.0
_LOOK_SECONDS, _DRIVER = 10.0, "bench"
_AIM, _MOST_TIME_IN_FLOAT8 = 0.8, 3.0
_FLOAT8 = [f"precision.{kind}=fp8" for kind in PRODUCTS] + ["training.dispatch_precision=float8", "optimizer.moments=bf16"]


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    float8: bool = Field(False, description="compare FP8 with BF16, both ours")


def run(config: RunConfig, settings: Settings) -> dict:
    """Tokens a second at the median step, medians over rounds; `ratio` is ours divided by the peer's, or the time of FP8 by BF16's."""
    config = parse(config.model_dump(), [
        f"training.steps={STEPS}", "training.validation_sequences=0", "checkpoint.every=0", "run.name=bench-tokens"])
    data = session.data_path(config)
    return _in_float8(config, data) if settings.float8 else _against_plain(config, data)


def _in_float8(config: RunConfig, data: str) -> dict:
    config = parse(config.model_dump(), ["training.dtype=bfloat16"])
    speeds: dict[str, list[float]] = {"bf16": [], "fp8": []}
    for index in range(ROUNDS):
        for name, overrides in (("bf16", []), ("fp8", _FLOAT8)):
            speed, breakdown = _system(parse(config.model_dump(), overrides), data)
            print(f"round {index}: {name} {speed:.0f} tokens/s, {breakdown}", file=sys.stderr, flush=True)
            speeds[name].append(speed)
    ratio = statistics.median(speeds["bf16"]) / statistics.median(speeds["fp8"])
    held = ratio <= _MOST_TIME_IN_FLOAT8
    return {
        "settings": {"rounds": ROUNDS, "steps": STEPS, "warm_up_steps": WARM_UP, "float8": _FLOAT8},
        "seconds": {name: [_seconds(config, speed) for speed in found] for name, found in speeds.items()},
        "tokens_per_second": speeds, "ratio": ratio, "ratios": [a / b for a, b in zip(speeds["bf16"], speeds["fp8"])],
        "checks": {f"FP8 takes at most {_MOST_TIME_IN_FLOAT8:g} times as long as BF16": held}, "valid": held,
    }


def _against_plain(config: RunConfig, data: str) -> dict:
    batches = batches_of_text(config, STEPS)
    ours, peers, breakdowns = [], [], []
    for index in range(ROUNDS):
        speed, breakdown = _system(config, data)
        peer = _peer(config, batches)
        print(f"round {index}: system {speed:.0f} tokens/s, plain {peer:.0f} tokens/s, {breakdown}", file=sys.stderr, flush=True)
        ours.append(speed)
        peers.append(peer)
        breakdowns.append(breakdown)
    names = breakdowns[0].keys()
    return {
        "settings": {"rounds": ROUNDS, "steps": STEPS, "warm_up_steps": WARM_UP, "ranks": 4, "plain_processes": os.cpu_count(),
                     "dtype": config.training.dtype, "sequences": config.training.batch_sequences,
                     "sequence_length": config.data.sequence_length},
        "seconds": {"system": [_seconds(config, s) for s in ours], "plain": [_seconds(config, s) for s in peers]},
        "tokens_per_second": {"system": ours, "plain": peers},
        "ratio": statistics.median(ours) / statistics.median(peers),
        "ratios": [a / b for a, b in zip(ours, peers)],
        "aim": _AIM,
        "breakdown": {name: statistics.median(found[name] for found in breakdowns) for name in names},
    }


def _system(config: RunConfig, data: str) -> tuple[float, dict[str, float]]:
    """Tokens a second of the median step from one commit to the next, and where a rank's time went, as shares of it."""
    import ray

    session.connect()
    folder = tempfile.mkdtemp(prefix="dualray-bench-")
    try:
        corpus.prepare(config, data)
        config = config.model_copy(update={"run": config.run.model_copy(update={"directory": folder})})
        layout = choose(session.nodes(config), config.layout, config.model, config.stages)
        from actors.hosts.coordinator import Coordinator
        from actors.hosts.stage_actor import create

        ranks = [create(config, Member(place.node, place.local)) for place in layout.places]
        coordinator = Coordinator.remote(config, layout, ranks, data)
        for call in (coordinator.open.remote(), coordinator.begin.remote(_DRIVER)):
            if isinstance(failed := ray.get(call, timeout=_TIMEOUT_SECONDS), Failure):
                raise JobFailed(failed.reason)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while (found := ray.get(coordinator.outcome.remote(_LOOK_SECONDS), timeout=_TIMEOUT_SECONDS)) is None:
            if time.monotonic() > deadline:
                raise JobFailed(f"no end within {_TIMEOUT_SECONDS:g} s")
            ray.get(coordinator.updates.remote(_DRIVER, 0), timeout=_TIMEOUT_SECONDS)  # it shows that this process lives
        if isinstance(found, Failure):
            raise JobFailed(found.reason)
        return _figures(RunFolder(folder, config.run.name).metric_lines())
    finally:
        session.disconnect()
        shutil.rmtree(folder, ignore_errors=True)


def _figures(steps: list[dict[str, Any]]) -> tuple[float, dict[str, float]]:
    measured = steps[WARM_UP:]
    wall = measured[-1]["time"] - steps[WARM_UP - 1]["time"]
    typical = statistics.median(after["time"] - before["time"] for before, after in zip(steps[WARM_UP - 1:], measured))
    total = {key: sum(step[key] for step in measured) for key in
             ("compute_seconds", "exposed_comm_seconds", "seconds", "rank_seconds", "tokens")}
    waiting = sum(step["bubble_ratio"] * step["rank_seconds"] for step in measured)
    return measured[-1]["tokens"] / typical, {
        "compute": total["compute_seconds"] / wall, "exchange and reduce": total["exposed_comm_seconds"] / wall,
        "waiting for the pipeline, update, publish": waiting / wall,
        "coordinator: call and commit": (total["seconds"] - total["rank_seconds"]) / wall,
        "between steps: feed, journal": (wall - total["seconds"]) / wall,
    }


def _peer(config: RunConfig, batches: list[Batch]) -> float:
    size = os.cpu_count() or 1
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as processes:
        port = _free_port()
        found = [processes.submit(plain.data_parallel, config, batches, rank, size, port) for rank in range(size)]
        seconds = [max(step) for step in zip(*(future.result(_TIMEOUT_SECONDS) for future in found))][WARM_UP:]
    return config.training.batch_sequences * config.data.sequence_length / statistics.median(seconds)


def _seconds(config: RunConfig, speed: float) -> float:
    return config.training.batch_sequences * config.data.sequence_length / speed


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
