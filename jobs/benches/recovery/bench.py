"""What a lost node costs: faults at random places of a step, on a cluster of real raylets, and what two peers make of them.

Every node is a network namespace with a raylet of its own; `python -m jobs.train` is the driver. Faults come from outside, in turn:
a node with all its processes killed; cut off without a reset; frozen; one rank's process killed. In between the node comes back
and the layout is whole again. Times are read from the run's own journals, which this process's clock is shared with. A second part
has killed nodes only and models of several sizes: what of a recovery is constant, and what is bytes. Needs root.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from jobs import corpus
from jobs.benches.recovery import peers as recovery_peers
from jobs.benches.recovery.picture import draw
from jobs.benches.recovery.run import CUT, FROZEN, KILLED, KINDS, RANK, RunFailed, blows, bring_back, heal, strike, training
from jobs.benches.recovery.times import Incident, line_through
from jobs.benches.shared.networks import NetworkRefused
from jobs.benches.shared.raylets import ClusterFailed, RayletCluster
from jobs.driver import session
from orchestrator.config.run_config import Real, RunConfig, Section, parse
from orchestrator.plan import cost
from orchestrator.refusal import ConfigError
from orchestrator.told.kinds import RanksLost

CHECKS = {"initial_delay_ms": 0, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 5}
"""Ray's own, so that it counts a lost node as lost after some ten seconds, and a busy one not at all."""
NICENESS = {"RAY_worker_niceness": "0"}
"""By default Ray has its workers give way to everything else on a host."""
MEDIAN_BAR, WORST_BAR, SILENT_BAR, PEER_BAR = 1.5, 3.0, 2.5, 10.0
_INTERRUPTED = 130
_AUDIT_SECONDS = 300.0
_KIND_OF_PEER = {RANK: recovery_peers.RANK, KILLED: recovery_peers.NODE}


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    faults: int = Field(20, ge=0, description="of each of the two models")
    seed: int = Field(1, ge=0)
    raylets: int = Field(4, ge=3)
    ranks: int = Field(2, ge=1, description="of a raylet")
    megabits: Real = Field(10_000.0, gt=0, description="a second, of every node's link, in each direction")
    silence_seconds: Real = Field(1.0, gt=0)
    cool_down_seconds: Real = Field(1.0, ge=0)
    sequences: int = Field(16, ge=1, description="of a step")
    million: Real = Field(50.0, gt=0, description="parameters of the second model")
    slope: list[Real] = Field([5.0, 50.0, 150.0], description="million parameters of the models whose recovery is compared")
    slope_faults: int = Field(3, ge=0, description="killed nodes for each of them")
    peers: bool = Field(True, description="measure Ray Train and torchft too; they take some 15 minutes")
    peer_faults: int = Field(3, ge=1, description="of each kind, for each of them")
    torchft_python: str = Field(sys.executable, description="an interpreter that has torchft")
    picture: str | None = Field(None, description="a PNG: tokens a second and loss over the time in which a node dies and returns")


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Recoveries, peers and whether the bars hold. Raises ConfigError."""
    started = time.perf_counter()
    tiny = _configured(config, settings, "tiny")
    models = {"tiny": tiny, f"{settings.million:g}M": _wide(tiny, settings.million)} if settings.faults else {}
    results, checks, slope = {}, {}, {}
    try:
        with RayletCluster(settings.raylets, settings.ranks, settings.megabits, CHECKS, NICENESS) as cluster:
            for name, of_model in models.items():
                results[name] = _measure(cluster, of_model, name, KINDS, settings.faults, settings.seed)
                checks |= _verdicts(name, results[name])
            for million in settings.slope if settings.slope_faults else ():
                name = f"{million:g}M"
                slope[name] = _measure(cluster, _wide(tiny, million), name, (KILLED,), settings.slope_faults, settings.seed + 1)
            if settings.picture:
                checks["picture: both runs went on to their end"] = _drawn(cluster, tiny, settings.picture)
    except NetworkRefused as error:
        raise ConfigError("bench", "recovery", f"a machine that gives it network namespaces: {error}") from None
    except ClusterFailed as error:
        raise ConfigError("bench", "recovery", f"a machine on which raylets come up: {error}") from None
    fitted, held = _fitted(slope)
    checks |= held
    peers = recovery_peers.peers(tiny, recovery_peers.PeerSettings(
        rank_faults=settings.peer_faults, node_faults=min(settings.peer_faults, 3), seed=settings.seed,
        torchft_python=settings.torchft_python)) if settings.peers and models else {}
    ratio = _against(peers, results.get("tiny"))
    if recovery_peers.RAY_TRAIN + recovery_peers.TUNED in ratio:
        for kind, found in ratio[recovery_peers.RAY_TRAIN + recovery_peers.TUNED].items():
            checks[f"{kind}: a step of the whole batch at least {PEER_BAR:g} times sooner than Ray Train tuned"] = found >= PEER_BAR
    return {"settings": settings.model_dump(), "ray_health_checks": CHECKS, "environment": NICENESS,
            "results": results, "slope": slope, "fit": fitted,
            "peers": {name: found.summary() for name, found in peers.items()}, "seconds": _seconds(results), "ratio": ratio,
            "run_seconds": time.perf_counter() - started, "checks": checks, "valid": all(checks.values())}


def _configured(config: RunConfig, settings: Settings, name: str) -> RunConfig:
    """The run's model on this cluster, without an end, and nothing in its steps but training."""
    data = session.data_path(config)
    corpus.prepare(config, data)
    return parse(config.model_dump(), [
        f"run.name={name}", f"data.path={data}", "training.steps=1000000", f"training.batch_sequences={settings.sequences}",
        "training.microbatch_sequences=1", "training.validate_every=0", "training.validation_sequences=0", "checkpoint.every=0",
        f"layout.expert={settings.raylets * settings.ranks // config.layout.pipeline}", "layout.data=auto",
        "topology.virtual_nodes=0", "topology.ranks_per_node=auto", f"elastic.silence_seconds={settings.silence_seconds}",
        f"elastic.cool_down_seconds={settings.cool_down_seconds}"])


def _wide(config: RunConfig, million: float) -> RunConfig:
    """Few layers, wide experts of which a token uses one: much state, little compute."""
    hidden, experts, layers = 256, 16, 2
    width = round(million * 1e6 / (3 * hidden * experts * layers))
    return parse(config.model_dump(), [
        f"run.name=wide-{million:g}M", f"model.num_hidden_layers={layers}", "model.first_k_dense_replace=0", f"model.hidden_size={hidden}",
        f"model.moe_intermediate_size={width}", f"model.n_routed_experts={experts}", "model.num_experts_per_tok=1",
        "model.num_nextn_predict_layers=0", "training.dtype=float32", "optimizer.learning_rate=3e-4",
        "optimizer.final_learning_rate=3e-5"])


def _measure(cluster: RayletCluster, config: RunConfig, name: str, kinds: tuple[str, ...], count: int, seed: int) -> dict[str, Any]:
    """One run under so many faults. What goes wrong is in the result."""
    incidents: list[Incident] = []
    returned, lost, failed, audit, steps, struck = [], 0, None, None, [], None
    load = [os.getloadavg()]
    try:
        with training(cluster, config) as run_:
            steps = [step["seconds"] for step in run_.steps[1:]]
            for blow in blows(kinds, count, cluster.nodes, seed):
                struck = blow
                incidents.append(strike(run_, blow))
                found = incidents[-1]
                say(f"{name}: {blow.kind} at {blow.share:.2f} of a step: first action {found.first_action:.3f} s, "
                    f"whole batch {found.full_batch:.3f} s, {found.phases}, {found.bytes / 1e6:.1f} MB")
                returned.append(bring_back(run_, blow))
                struck = None
            lost = len(run_.events_of(RanksLost))
            code = run_.stop()
            audit = _audit(run_.path)
            if code != _INTERRUPTED:
                failed = f"exit code {code} after SIGINT: {run_.last_words()}"
    except (RunFailed, ClusterFailed, ValueError) as error:
        failed = str(error)
        if struck is not None:
            heal(cluster, struck.node)
        say(f"{name}: {failed}")
    load.append(os.getloadavg())
    return {
        "parameters": cost.parameters(config.model).main, "step_seconds": statistics.median(steps) if steps else None,
        "faults_asked": count, "faults": [dataclasses.asdict(found) for found in incidents], "came_back": returned,
        "summary": {kind: _summary([found for found in incidents if found.kind == kind]) for kind in kinds},
        "lost_without_a_fault": max(0, lost - sum(found.attempts for found in incidents)), "audit": audit, "failed": failed,
        "load_average": load}


def _drawn(cluster: RayletCluster, config: RunConfig, file: str) -> bool:
    """Raises ConfigError: the file cannot be written."""
    try:
        draw(cluster, config, file)
    except RunFailed as error:
        say(f"picture: {error}")
        return False
    except OSError as error:
        raise ConfigError("picture", file, f"a file that can be written ({error.strerror})") from None
    return True


def _audit(path: Path) -> dict[str, Any]:
    """What `python -m jobs.status audit` says of the run."""
    done = subprocess.run([sys.executable, "-m", "jobs.status", "audit", str(path), "--json"], cwd=Path(__file__).parents[3],
                          capture_output=True, text=True, timeout=_AUDIT_SECONDS, check=False)
    if not done.stdout.startswith("{"):
        return {"clean": False, "problems": done.stderr.strip()}
    found = json.loads(done.stdout)
    return {key: found[key] for key in ("clean", "steps", "sequences", "problems")}


def _summary(found: Sequence[Incident]) -> dict[str, Any]:
    """Medians, and the worst."""
    if not found:
        return {}
    median = {key: statistics.median(getattr(one, key) for one in found)
              for key in ("noticed", "aborted", "slowest_abort", "first_action", "full_batch", "step", "bytes")}
    phases = {phase.name: statistics.median(getattr(one.phases, phase.name) for one in found)
              for phase in dataclasses.fields(found[0].phases)}
    return {"faults": len(found), "median": median, "median_phases": phases,
            "worst_first_action": max(one.first_action for one in found), "worst_abort": max(one.slowest_abort for one in found)}


def _verdicts(name: str, result: dict[str, Any]) -> dict[str, bool]:
    faults = result["faults"]
    killed = [one["first_action"] for one in faults if one["kind"] in (KILLED, RANK)]
    silent = [one["first_action"] for one in faults if one["kind"] in (CUT, FROZEN)]
    checks = {
        f"{name}: all faults were got over, and the run ended as it was asked to": (
            result["failed"] is None and len(faults) == result["faults_asked"]),
        f"{name}: no committed step lost, at most one redone, no token lost": all(
            one["steps_lost"] == 0 and one["steps_redone"] <= 1 and one["tokens_lost"] == 0 for one in faults),
        f"{name}: no survivor was restarted": all(one["survivors_restarted"] == 0 for one in faults),
        f"{name}: the audit is clean": bool(result["audit"] and result["audit"]["clean"])}
    if killed:
        checks[f"{name}: first action after a kill <= {MEDIAN_BAR} s, median"] = statistics.median(killed) <= MEDIAN_BAR
        checks[f"{name}: first action after a kill <= {WORST_BAR} s, worst"] = max(killed) <= WORST_BAR
    if silent:
        checks[f"{name}: first action after a cut or a freeze <= {SILENT_BAR} s, median"] = statistics.median(silent) <= SILENT_BAR
    return checks


def _fitted(slope: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, bool]]:
    """Seconds from a kill to the first action = constant + bytes / bandwidth, by least squares; and what is constant, by size."""
    faults = [one for found in slope.values() for one in found["faults"]]
    if len({one["bytes"] for one in faults}) < 2:
        return None, {}
    constant = {name: statistics.median(sum(one["phases"][phase] for phase in ("notice", "abort", "decide", "regroup"))
                                        for one in found["faults"]) for name, found in slope.items() if found["faults"]}
    line = line_through([(one["bytes"], one["first_action"]) for one in faults])
    say(f"first action = {line.constant:.3f} s + bytes / {1 / line.slope / 1e6:.0f} MB/s (r2 = {line.r2:.3f}); until the groups "
        f"stand: {', '.join(f'{name} {seconds:.3f} s' for name, seconds in constant.items())}")
    return ({"constant_seconds": line.constant, "megabytes_per_second": 1 / line.slope / 1e6, "r2": line.r2,
             "until_regrouped_seconds": constant},
            {"slope: every size was measured": all(len(found["faults"]) == found["faults_asked"] for found in slope.values()),
             "slope: bytes explain at least 0.8 of the variance": line.r2 >= 0.8})


def _against(peers: dict[str, recovery_peers.PeerTimes], ours: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    """By peer and kind: its median time from a fault to the end of a step ÷ our median time to a step of the whole batch."""
    found: dict[str, dict[str, float]] = {}
    for name, peer in peers.items() if ours else ():
        for kind, theirs in _KIND_OF_PEER.items():
            summary, median = ours["summary"].get(kind), peer.median(theirs)
            if summary and median is not None:
                found.setdefault(name, {})[kind] = median / summary["median"]["full_batch"]
    return found


def _seconds(results: dict[str, Any]) -> dict[str, Any]:
    """From each fault to the first action, by model and kind."""
    return {name: {kind: [one["first_action"] for one in found["faults"] if one["kind"] == kind] for kind in KINDS}
            for name, found in results.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
