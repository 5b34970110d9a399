"""Overlap on links that are slow in truth: dispatch and combine under compute, against the same without, and against torch's.

Nodes are network namespaces whose interfaces are shaped; ranks are processes in them. Compute is held for set times, so that
more ranks than cores can be told apart; bytes are real, in real sockets. The payload is chosen so that communication takes
0.913 times as long as the compute of a pair, as in DeepSeek's published trace: both measured alone before the first step.
All contestants run in the same processes, in turn, each as often as the others; every repeat is reported.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from actors.telemetry.trace import trace_json
from jobs.benches.overlap.cluster import Alone, Cluster, ClusterShape, ClusterStep, TokenPayload, say
from jobs.benches.overlap.compare import OFF, PEER, OverlapCase, compare, expected_bytes, verdicts
from jobs.benches.overlap.held import Seconds
from jobs.benches.overlap.plan import durations_of, fixed, found, task_of, torch_task
from jobs.benches.overlap.tiny import tiny
from jobs.benches.shared.networks import NetworkRefused
from orchestrator.config.run_config import Real, RunConfig, Section
from orchestrator.refusal import ConfigError
from orchestrator.schedule.search.portfolio import EFFORT
from orchestrator.schedule.timing.durations import EXCHANGE_RATIO

_SHAPE = re.compile(r"PP([1-9][0-9]*)xEP([1-9][0-9]*)")
_FIXED = ("dualpipe", "dualpipev")
_WARM_UP = 0.2
_TRIALS = 4
_NEAR = 0.02
"""How far from the ratio that it aims at a payload may be, as a share of it."""


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    shapes: list[str] = Field(["PP2xEP4", "PP4xEP4", "PP2xEP8"], description="positions of a pipeline, which a node has, and "
                              "ranks of an EP group, which all nodes share")
    nodes: int = Field(4, ge=2)
    megabits: Real = Field(20.0, gt=0, description="a second, of every rank's interface, in each direction")
    milliseconds: list[Real] = Field([12.0, 24.0, 32.0], description="of half a layer's F, I and W each, by shape: every exchange "
                                             "costs the cores about 1 ms for each rank, which must stay a small part of it")
    layers: int = Field(4, ge=2, multiple_of=2, description="of a position; two stages may share them")
    microbatches: int = Field(8, ge=2, description="times the positions of a pipeline: of a step")
    tokens: int = Field(8, ge=1, description="of a microbatch on a rank")
    alone: int = Field(80, ge=10, description="exchanges of each size that are timed while nothing else runs")
    ratio: Real = Field(EXCHANGE_RATIO, gt=0, description="communication over compute of a pair")
    repeats: int = Field(3, ge=1)
    effort: int = Field(EFFORT, ge=1, description="of each search")
    slow_link: Real = Field(0.1, gt=0, lt=1, description="share of its speed that one link is left with")
    slow_repeats: int = Field(2, ge=0, description="of steps with that link, in the first shape, of half as many microbatches")
    tiny_steps: int = Field(6, ge=0, description="steps of the real model, with and without overlap")
    trace: str | None = Field(None, description="file for the spans of one more step of the first shape: step 0 with overlap, "
                                                "step 1 without")


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Step times, what is exposed of communication, and whether the bars hold. Raises ConfigError."""
    started, results, checks = time.perf_counter(), {}, {}
    shapes = [_shape(text, settings) for text in settings.shapes]
    if len(settings.milliseconds) < len(shapes) or min(settings.milliseconds) <= 0:
        raise ConfigError("milliseconds", settings.milliseconds, f"a number above 0 for each of {len(shapes)} shapes")
    try:
        for shape, milliseconds in zip(shapes, settings.milliseconds):
            results[shape.name], held = _measure(config, settings, shape, milliseconds / 1000, first=shape is shapes[0])
            checks |= held
        model = tiny(config, settings.tiny_steps, settings.megabits * 50) if settings.tiny_steps else None
    except NetworkRefused as error:
        raise ConfigError("bench", "overlap", f"a machine that gives it network namespaces: {error}") from None
    return {"settings": settings.model_dump(), "results": results, "tiny": model,
            "seconds": {name: {which: entry["seconds"] for which, entry in found["contestants"].items()}
                        for name, found in results.items()},
            "ratio": {name: found["ratio"] for name, found in results.items()},
            "run_seconds": time.perf_counter() - started, "checks": checks, "valid": all(checks.values())}


def _shape(text: str, settings: Settings) -> ClusterShape:
    """Raises ConfigError."""
    match = _SHAPE.fullmatch(text)
    if match is None or int(match[1]) % 2 or int(match[2]) % settings.nodes or int(match[2]) & (int(match[2]) - 1):
        raise ConfigError("shapes", text, f"PP<even>xEP<a power of two, and a multiple of nodes = {settings.nodes}>")
    return ClusterShape(settings.nodes, int(match[1]), int(match[2]) // settings.nodes)


def _measure(config: RunConfig, settings: Settings, shape: ClusterShape, hold: float, *, first: bool
             ) -> tuple[dict[str, Any], dict[str, bool]]:
    """hold: seconds of half a layer's F, I and W each. first: of the shapes, the one with a trace and with a slow link."""
    microbatches = settings.microbatches * shape.pipeline
    with Cluster(config, shape, settings.megabits) as cluster:
        payload, alone = _calibrated(cluster, settings, hold)
        for _ in range(_TRIALS):
            if abs(alone.layer / (6 * alone.hold) / settings.ratio - 1) <= _NEAR:
                break
            payload, alone = _calibrated(cluster, settings, hold)  # something else was running
        durations = durations_of(alone, settings.layers)
        contestants = {
            "compute only": OverlapCase(fixed("dualpipe", shape.pipeline, microbatches),
                                        replace(durations, dispatch=0.0, combine=0.0), communicates=False),
            "dualpipe": OverlapCase(fixed("dualpipe", shape.pipeline, microbatches), durations),
            "searched": OverlapCase(found(shape.pipeline, microbatches, durations, settings.effort), durations),
            OFF: OverlapCase(fixed("dualpipe", shape.pipeline, microbatches), durations, overlap=False),
            PEER: OverlapCase(None, durations),
        }
        tasks = [{name: torch_task(settings.layers, microbatches) if each.schedule is None
                  else task_of(each, position, settings.layers) for name, each in contestants.items()}
                 for position in range(shape.pipeline)]
        cluster.prepare(tasks, payload, Seconds(hold, hold, hold))
        for name in ("dualpipe", PEER):  # connections, buffers and code are warm after it
            cluster.step(name, _WARM_UP)
        steps = _steps(cluster, list(contestants), settings.repeats)
        wanted = {name: expected_bytes(shape, payload, settings.layers * microbatches, peer=each.schedule is None)
                  if each.communicates else 0 for name, each in contestants.items()}
        result = compare(contestants, steps, wanted, shape.members)
        result |= {"calibration": _calibration(hold, payload, alone)}
        checks = verdicts(shape.name, result)
        checks[f"{shape.name}: alone, communication is within {_NEAR} of {settings.ratio} of a pair's compute"] = (
            abs(result["calibration"]["ratio"] / settings.ratio - 1) <= _NEAR)
        if first and settings.trace:
            _write_trace(cluster, settings.trace)
        if first and settings.slow_repeats:
            result["slow_link"], held = _with_a_slow_link(cluster, settings, payload, hold)
            checks |= held
    return result, checks


def _steps(cluster: Cluster, names: list[str], repeats: int) -> dict[str, list[ClusterStep]]:
    """Every contestant in turn."""
    steps: dict[str, list[ClusterStep]] = {name: [] for name in names}
    for repeat in range(repeats):
        at = repeat * len(names) // repeats
        for name in names[at:] + names[:at]:
            steps[name].append(cluster.step(name))
        say(f"{cluster.shape.name}, repeat {repeat}: " + ", ".join(f"{name} {steps[name][-1].seconds:.3f}" for name in names))
    return steps


def _write_trace(cluster: Cluster, file: str) -> None:
    """Raises ConfigError: the file cannot be written."""
    steps = {number: cluster.step(name, traced=True).steps for number, name in enumerate(("dualpipe", OFF))}
    spans = {number: [span for rank in ranks for span in rank.spans] for number, ranks in steps.items()}
    try:
        Path(file).write_text(trace_json(spans, dict.fromkeys(spans, cluster.layout.places)), encoding="utf-8")
    except OSError as error:
        raise ConfigError("trace", file, f"a file that can be written ({error.strerror})") from None


def _calibrated(cluster: Cluster, settings: Settings, hold: float) -> tuple[TokenPayload, Alone]:
    """The payload whose exchanges take `ratio` times as long as a pair's holds, and what everything takes with it."""
    wanted = settings.ratio * 6 * hold  # of a layer: half a layer twice, in each of F, I and W; four exchanges
    copies = cluster.shape.members - cluster.shape.width
    hidden = max(4, round(wanted / 4 * settings.megabits * 1e6 / 1.6 / (32 * settings.tokens * copies)))  # a first guess
    _layer(cluster, TokenPayload(settings.tokens, hidden), settings.alone)  # connections and buffers are warm after it
    taken = {width: _layer(cluster, TokenPayload(settings.tokens, width), settings.alone) for width in (hidden // 2, hidden)}
    for _ in range(_TRIALS):
        one, other = sorted(taken, key=lambda width: abs(taken[width] - wanted))[:2]
        slope = (taken[one] - taken[other]) / (one - other)
        hidden = max(2, round(one + (wanted - taken[one]) / slope)) if slope > 0 else one
        if hidden in taken:
            break
        taken[hidden] = _layer(cluster, TokenPayload(settings.tokens, hidden), settings.alone)
    payload = TokenPayload(settings.tokens, min(taken, key=lambda width: abs(taken[width] - wanted)))
    alone = cluster.alone(payload, hold, 3 * settings.alone // 2)
    say(f"{cluster.shape.name}: {payload}, {alone}")
    return payload, alone


def _layer(cluster: Cluster, payload: TokenPayload, repeats: int) -> float:
    """Seconds of the four exchanges of a layer, mean over positions."""
    found = cluster.exchange(payload, repeats)
    return sum(sum(times.values()) for times in found) / len(found)


def _calibration(hold: float, payload: TokenPayload, alone: Alone) -> dict[str, Any]:
    return {"hidden": payload.hidden, "tokens": payload.count, "hold_seconds": alone.hold, "hold_jitter": alone.hold_jitter,
            "exchange_seconds": list(alone.exchange), "all_to_all_single_seconds": alone.blocking, "hop_seconds": alone.hop,
            "ratio": alone.layer / (6 * alone.hold), "asked_seconds": hold}


# --- one slow link -----------------------------------------------------------------------------------------------------


def _with_a_slow_link(cluster: Cluster, settings: Settings, payload: TokenPayload, hold: float
                      ) -> tuple[dict[str, Any], dict[str, bool]]:
    """One interface at a share of its speed: the fixed kinds against what is searched, in either's placement, for the durations
    as they are now."""
    pipeline = cluster.shape.pipeline
    microbatches = max(2 * pipeline, settings.microbatches * pipeline // 2)  # each takes about ten times as long
    cluster.slow_down(0, 0, settings.megabits * settings.slow_link)
    alone = cluster.alone(payload, hold, 10)
    durations = durations_of(alone, settings.layers)
    contestants = {kind: OverlapCase(fixed(kind, pipeline, microbatches), durations) for kind in _FIXED}
    contestants["searched"] = OverlapCase(found(pipeline, microbatches, durations, settings.effort), durations)
    tasks = [{name: task_of(each, position, settings.layers) for name, each in contestants.items()}
             for position in range(pipeline)]
    cluster.prepare(tasks, payload, Seconds(hold, hold, hold))
    steps = _steps(cluster, list(contestants), settings.slow_repeats)
    result = compare(contestants, steps, {}, cluster.shape.members)
    result["exchange_seconds"] = list(alone.exchange)
    cluster.slow_down(0, 0, settings.megabits)
    medians = {name: entry["median"] for name, entry in result["contestants"].items()}
    return result, {f"{cluster.shape.name}: with a link at {settings.slow_link} of its speed, searched loses less than {kind}":
                    medians["searched"] < medians[kind] for kind in _FIXED}
