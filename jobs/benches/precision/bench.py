"""Training in FP8 against BF16 and FP32: the same model, tokens, seed and order; and what of FP8 as published it needs.

Loss: relative to that of BF16 at every step, raw and smoothed (exponential moving average with 0.9, as in DeepSeek-V3's report,
appendix B), beside the same of a BF16 run in another layout, which differs by the order of sums alone. Products: the error of one
linear layer with long sums, against float64, and of the same with one scale for a whole tensor, sums of 14 bits, or gradients in E5M2.
On CPUs FP8 is emulated: its numbers are those of FP8, its speed is not.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field

from actors.data.dataset import Dataset
from jobs import corpus
from jobs.benches.precision import products as precision_products
from jobs.benches.precision.train import say, trained
from jobs.driver import session
from orchestrator.config.precision import PRODUCTS
from orchestrator.config.run_config import Real, RunConfig, Section, parse
from orchestrator.refusal import ConfigError

FLOAT8 = tuple(f"precision.{kind}=fp8" for kind in PRODUCTS)
BF16, OTHER, FP8 = "bf16", "bf16, another layout", "fp8"
FEW_BITS = "fp8, sums of 14 bits"
ABLATIONS = {"fp8, one scale a tensor": "precision.scales=tensor", FEW_BITS: "precision.accumulation=14bit",
             "fp8, gradients in e5m2": "precision.gradients=e5m2"}
BAR, SMOOTHING, NEAR_THE_END = 0.0025, 0.9, 0.1


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    steps: int = Field(200, ge=4)
    sequences: int = Field(64, ge=1, description="of a step")
    ablations: bool = Field(True, description="train with them too; their products are measured in any case")
    ablation_steps: int = Field(60, ge=4, description="of those that are emulated slowly, sums of 14 bits")
    tokens: int = Field(4096, ge=128, description="rows of the products, and so terms of a weight gradient's sums")
    inputs: int = Field(4096, ge=128, description="terms of the other sums")
    learning_rate: Real = Field(5e-4, gt=0)
    picture: str | None = Field(None, description="a PNG: losses, and relative errors")


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Relative loss errors, errors of products, and whether the bar holds. Raises ConfigError."""
    started, data = time.perf_counter(), session.data_path(config)
    corpus.prepare(config, data)
    Dataset.open(data)
    base = _base(config, settings, data)
    losses, seconds = _all(base, settings)
    warm = config.optimizer.warmup_steps
    against = {name: errors(found, losses[BF16], warm) for name, found in losses.items() if name != BF16}
    products = precision_products.measure(settings.tokens, settings.inputs, {name: parse({}, [*FLOAT8, option]).precision
                                                                           for name, option in ABLATIONS.items()})
    fallen = losses[BF16][-1] / statistics.fmean(losses[BF16][-max(1, len(losses[BF16]) // 20):])
    checks = verdicts(against, products) | {"the loss has come within a tenth of its end": settled(losses[BF16]) < 0.75}
    if settings.picture:
        _draw(settings.picture, losses, warm)
    return {"settings": settings.model_dump(), "losses": losses, "errors": against, "products": products,
            "end": {name: statistics.fmean(found[-20:]) for name, found in losses.items()}, "last_step_over_mean_of_last": fallen,
            "seconds": seconds, "ratio": {name: seconds[name] / seconds[BF16] for name in seconds}, "bar": BAR,
            "run_seconds": time.perf_counter() - started, "checks": checks, "valid": all(checks.values())}


def _base(config: RunConfig, settings: Settings, data: str) -> RunConfig:
    return parse(config.model_dump(), [
        f"data.path={data}", f"training.steps={settings.steps}", f"training.batch_sequences={settings.sequences}",
        "training.microbatch_sequences=8", "training.validate_every=0", "training.validation_sequences=0", "checkpoint.every=0", "elastic.silence_seconds=600",
        "elastic.give_up_seconds=7200",
        "training.dtype=bfloat16", "layout.pipeline=1", "layout.expert=1", "layout.data=1", "topology.virtual_nodes=1",
        "topology.ranks_per_node=1", f"optimizer.learning_rate={settings.learning_rate}",
        f"optimizer.final_learning_rate={settings.learning_rate / 10}"])


def ways(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Overrides of every run, the slowest first, so that cores are even at the end."""
    found = {FP8: FLOAT8, "fp8 dispatch too": (*FLOAT8, "training.dispatch_precision=float8")}
    if settings.ablations:
        found = {name: (*FLOAT8, option) for name, option in ABLATIONS.items()} | found
    other = ("layout.pipeline=2", "topology.virtual_nodes=2")
    return found | {OTHER: other, "fp32": ("training.dtype=float32",), BF16: ()}


def _all(base: RunConfig, settings: Settings) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Losses of every step, and seconds of a step, of every way; as many at once as there are cores."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    left = context.Queue()
    for core in cores:
        left.put(core)
    with ProcessPoolExecutor(len(cores), context, initializer=_on_a_core, initargs=(left,)) as pool:
        waiting: dict[str, Future] = {}
        for name, overrides in ways(settings).items():
            steps = min(settings.steps, settings.ablation_steps) if name == FEW_BITS else settings.steps
            waiting[name] = pool.submit(trained, parse(base.model_dump(), list(overrides)), steps)
        found = {}
        for name, future in waiting.items():
            found[name] = future.result()
            say(f"{name}: {found[name][1]:.3f} s a step, loss {statistics.fmean(found[name][0][-20:]):.4f}")
    return {name: losses for name, (losses, _) in found.items()}, {name: seconds for name, (_, seconds) in found.items()}


def _on_a_core(left: Any) -> None:
    """Each worker of the pool has a core of its own, and so have the ranks that it starts."""
    os.sched_setaffinity(0, {left.get()})


def errors(found: Sequence[float], reference: Sequence[float], warm: int) -> dict[str, float]:
    """Of relative differences from step `warm` on: the largest and the mean, raw and of smoothed losses, and the mean with sign."""
    smooth, of_reference = smoothed(found), smoothed(reference)
    raw = [one / other - 1 for one, other in zip(found, reference)][warm:]
    gentle = [one / other - 1 for one, other in zip(smooth, of_reference)][warm:]
    return {"largest_smoothed": max(map(abs, gentle)), "mean_smoothed": statistics.fmean(map(abs, gentle)),
            "bias": statistics.fmean(gentle), "largest_raw": max(map(abs, raw)), "mean_raw": statistics.fmean(map(abs, raw)),
            "end": gentle[-1], "steps": len(gentle)}


def smoothed(losses: Sequence[float]) -> list[float]:
    found: list[float] = []
    for loss in losses:
        found.append(loss if not found else SMOOTHING * found[-1] + (1 - SMOOTHING) * loss)
    return found


def settled(losses: Sequence[float]) -> float:
    """Share of the steps after which the smoothed loss is within a tenth of its end."""
    gentle = smoothed(losses)
    late = [step for step, loss in enumerate(gentle) if abs(loss / gentle[-1] - 1) > NEAR_THE_END]
    return (late[-1] + 1) / len(gentle) if late else 0.0


def verdicts(against: dict[str, dict[str, float]], products: dict[str, dict[str, float]]) -> dict[str, bool]:
    checks = {f"{FP8}: |relative loss error| against bf16 <= {BAR:.2%}, smoothed, from the end of warm-up":
              against[FP8]["largest_smoothed"] <= BAR}
    published = products["published"]
    for name, found in products.items():
        if name != "published":
            checks[f"{name}: its weight gradient is further off than as published"] = found["dw"] > published["dw"]
    few = products[FEW_BITS]
    checks[f"{FEW_BITS}: sums are 100 times further off"] = all(few[f"sums of {key}"] > 100 * published[f"sums of {key}"]
                                                                 for key in ("y", "dx", "dw"))
    return checks


def _draw(path: str, losses: dict[str, list[float]], warm: int) -> None:
    """Raises ConfigError: the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    limit = 200 * BAR
    for name, found in losses.items():
        left.plot(smoothed(found), label=name, linewidth=1)
        if name != BF16:
            pairs = zip(smoothed(found), smoothed(losses[BF16]))
            shown = [100 * (one / other - 1) for one, other in pairs][warm:]
            right.plot(shown, label=name, linewidth=1)
            limit = max(limit, 1.1 * max(map(abs, shown), default=0.0))
    for level in (-100 * BAR, 100 * BAR):
        right.axhline(level, color="black", linewidth=0.6, linestyle=":")
    left.set(title="loss, smoothed", xlabel="step", ylabel="nats a token")
    right.set(title="relative to bf16", xlabel=f"step after warm-up ({warm})", ylabel="%", ylim=(-limit, limit))
    left.legend(fontsize=7)
    try:
        figure.savefig(Path(path), dpi=120)
    except OSError as error:
        raise ConfigError("picture", path, f"a file that can be written ({error.strerror})") from None
