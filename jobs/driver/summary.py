"""The end of a run in one look: a few lines, and `summary.png` in the run folder."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from orchestrator.told import kinds
from orchestrator.told.consumers import Selection
from orchestrator.told.lines import Told

OWN_BIGRAM = "own bigram"
_READ = Selection((kinds.Validated,), leaves=(
    kinds.LayoutPlanned, kinds.GenerationFormed, kinds.GenerationLoaded, kinds.Resumed, kinds.StartedOver, kinds.ExpertsPlaced,
    kinds.RanksLost, kinds.Interrupted, kinds.RanksAborted, kinds.CommittedStateLost, kinds.CoordinatorRestarted,
    kinds.NodesJoining, kinds.NodesDraining, kinds.NodesAwaited, kinds.NodeIdle, kinds.NodeBarred, kinds.Slow, kinds.SlowOver,
    kinds.CheckpointWritten, kinds.CheckpointFailed, kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway,
    kinds.DataAway, kinds.ControlStoreAway, kinds.ControlStoreBack, kinds.NotFinite, kinds.Replayed, kinds.UnknownEvent))


def validations(events: Iterable[Told]) -> list[tuple[int, float]]:
    """(committed steps, loss) of each."""
    return [(told.event.step, told.event.loss) for told in _READ.of(events, kinds.Validated)]


def lines(steps: list[dict[str, Any]], validation: list[tuple[int, float]], baselines: dict[str, float], path: str) -> list[str]:
    """The summary as text. `validation`: (committed steps, loss); `baselines`: cross-entropies of n-gram models, nats."""
    if not steps:
        return [f"no step was run; see {path}"]
    warm = steps[min(len(steps) - 1, 2):]
    seconds = sum(values["seconds"] for values in warm)
    found = [f"steps        {steps[-1]['step'] + 1}, {sum(v['tokens'] for v in steps):,} tokens, "
             f"{sum(v['tokens'] for v in warm) / seconds:,.0f} tokens/s",
             f"loss         {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f} (training)"]
    if validation:
        found.append(f"validation   {validation[-1][1]:.4f} nats a token after {validation[-1][0]} steps")
    if baselines:
        fitted = ", ".join(f"{name} {value:.4f}" for name, value in baselines.items() if name != OWN_BIGRAM)
        found.append(f"n-grams      {fitted} (cross-entropy of the same text), {baselines[OWN_BIGRAM]:.4f} "
                     "(its bigram entropy by its own counts)")
    found.append(f"run folder   {path}")
    return found


def picture(steps: list[dict[str, Any]], validation: list[tuple[int, float]], baselines: dict[str, float]) -> bytes:
    """PNG: loss over steps with validation and n-gram levels; below, tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    numbers = [values["step"] + 1 for values in steps]
    loss.plot(numbers, [values["loss"] for values in steps], color="#3b6ea5", linewidth=1.2, label="training")
    if validation:
        loss.plot(*zip(*validation), color="#c8553d", marker="o", linewidth=1.5, label="validation")
    for (name, level), style in zip(baselines.items(), (":", "--", "-.", (0, (1, 3)))):
        loss.axhline(level, color="#777777", linestyle=style, linewidth=1, label=f"{name} {level:.2f}")
    loss.set_ylabel("loss, nats a token")
    loss.legend(frameon=False)
    speed.plot(numbers, [values["tokens_per_second"] for values in steps], color="#4c8c4a", linewidth=1.2)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("step")
    for axes in (loss, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120)
    return target.getvalue()
