"""A held rank (churn_rank.py) that exports as a StageActor does."""

from __future__ import annotations

from actors.calls.messages import StepReport, StepRequest
from actors.telemetry.exporter import Exporter, RankMetrics
from jobs.benches.churn.rank import HeldRank, held_rank
from orchestrator.config.run_config import RunConfig


def metered_rank(config: RunConfig, seconds: float, port: int) -> HeldRank:
    """What a process hosts. port: of its exporter."""
    rank, metrics = held_rank(config, seconds), RankMetrics()
    rank.exporter = Exporter(metrics.registry, ("127.0.0.1",), port)
    step = rank.step

    def observed(request: StepRequest) -> StepReport:
        report = step(request)
        metrics.observe(report)
        return report

    rank.step = observed
    return rank
