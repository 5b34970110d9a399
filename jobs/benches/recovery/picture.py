"""A picture of a node that dies and comes back: tokens a second over time, and the loss, beside that of a run that nothing disturbed."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

from jobs.benches.recovery.run import KILLED, Blow, bring_back, strike, training
from jobs.benches.recovery.times import READ
from jobs.benches.shared.raylets import RayletCluster
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.told import kinds
from orchestrator.told.lines import Told

_BEFORE, _AFTER = 25, 25
_SECONDS_FOR_STEPS = 300.0


def draw(cluster: RayletCluster, config: RunConfig, file: str) -> None:
    """Two runs, in float64: in float32 rounding alone moves a token to another expert now and then. Raises RunFailed, OSError."""
    config = parse(config.model_dump(), ["training.dtype=float64"])
    with training(cluster, config) as run:
        run.until_steps(_BEFORE, _SECONDS_FOR_STEPS)
        blow = Blow(KILLED, cluster.nodes[-1], 0.5)
        strike(run, blow)
        bring_back(run, blow)
        run.until_steps(_AFTER, _SECONDS_FOR_STEPS)
        steps, events = run.steps, run.events
    with training(cluster, config) as run:
        run.until_steps(len(steps), _SECONDS_FOR_STEPS)
        undisturbed = run.steps[: len(steps)]
    with open(file, "wb") as target:
        target.write(picture(steps, events, undisturbed))


def picture(steps: Sequence[dict[str, Any]], events: Sequence[Told], undisturbed: Sequence[dict[str, Any]]) -> bytes:
    """PNG. Above: tokens a second from one commit to the next, over seconds; below: loss over steps, of both runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    speed, loss = figure.subplots(2, 1)
    since = steps[1]["time"]  # the first one connects and warms up
    ends = [step["time"] - since for step in steps[1:]]
    rates = [after["tokens"] / (after["time"] - before["time"]) for before, after in itertools.pairwise(steps[1:])]
    speed.stairs(rates, ends, color="#4c8c4a", linewidth=1.2, baseline=None)
    speed.set_ylim(bottom=0, top=1.25 * max(rates))
    speed.set_xlabel("seconds")
    speed.set_ylabel("tokens/s")
    for told in READ.of(events, kinds.RanksLost, kinds.NodesJoining):
        text = "node lost" if isinstance(told.event, kinds.RanksLost) else "node joins"
        if told.time > since:
            speed.axvline(told.time - since, color="#c8553d", linestyle=":", linewidth=1)
            speed.annotate(text, (told.time - since, 1.2 * max(rates)), textcoords="offset points", xytext=(4, -8), fontsize=9)
    apart = max(abs(one["loss"] - other["loss"]) / other["loss"] for one, other in zip(steps, undisturbed, strict=True))
    loss.plot([step["step"] + 1 for step in undisturbed], [step["loss"] for step in undisturbed], color="#bbbbbb", linewidth=5,
              label="undisturbed")
    loss.plot([step["step"] + 1 for step in steps], [step["loss"] for step in steps], color="#3b6ea5", linewidth=1.2,
              label=f"with the fault; largest relative difference {apart:.0e}")
    loss.set_xlabel("step")
    loss.set_ylabel("loss, nats a token")
    loss.legend(frameon=False)
    for axes in (speed, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120)
    return target.getvalue()
