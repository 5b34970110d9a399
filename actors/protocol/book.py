"""What a step's reports say together, and the line of the ledger that follows from them, or why there must be none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.calls.messages import LossSums, StepReport
from actors.data.batching import Batch
from actors.telemetry.step_metrics import generation_record, losses_of
from orchestrator.config.run_config import RunConfig
from orchestrator.data import order
from orchestrator.data.ledger import LedgerLine, combine, digest_text
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.protocol.events import Ending
from orchestrator.recovery.replay import Replay
from orchestrator.told.kinds import NotFinite


@dataclass(frozen=True, slots=True)
class StepAccount:
    """A step that all ranks have computed. reports: by rank."""

    step: int
    generation: int
    batch: Batch
    reports: Sequence[StepReport]
    losses: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a step must not be committed. event: what is told besides; None: nothing."""

    ending: Ending
    text: str
    event: NotFinite | None = None


class Book:
    """config: the run's. replay: losses that must come out, if any."""

    def __init__(self, config: RunConfig, replay: Replay | None):
        self._config, self._replay = config, replay
        self._reports: dict[tuple[int, int], dict[int, StepReport]] = {}
        self._written: int | None = None

    def reported(self, generation: int, rank: int, report: StepReport) -> None:
        self._reports.setdefault((generation, report.step), {})[rank] = report

    def account(self, generation: int, step: int, batch: Batch) -> StepAccount:
        """Of a step whose ranks have all reported."""
        found = self._reports[generation, step]
        reports = [found[rank] for rank in sorted(found)]
        losses = losses_of(sum((report.losses for report in reports), LossSums()), batch, self._config)
        return StepAccount(step, generation, batch, reports, losses)

    def refusal(self, account: StepAccount) -> Refusal | None:
        """Why this step must not be committed; None: it may."""
        step, losses, norm = account.step, account.losses, account.reports[0].gradient_norm
        if not (all(map(math.isfinite, losses.values())) and math.isfinite(norm)):
            return Refusal(Ending.NOT_FINITE, f"step {step}: loss {losses['loss']}, gradient norm {norm}: not finite; no update was "
                           f"made, the weights are those after {step} steps",
                           NotFinite(step, repr(norm), **{name: repr(value) for name, value in losses.items()}))
        entered, labelled = (digest_text(combine(report.digests[end] for report in account.reports)) for end in (0, 1))
        if entered != labelled:
            return Refusal(Ending.OWN_FAULT, f"step {step}: sequences {entered} entered the pipeline, but labels are of {labelled}")
        replay = self._replay
        if replay is not None and step < replay.steps and losses["loss"] != replay.losses[step]:
            return Refusal(Ending.OWN_FAULT, f"step {step}: loss {losses['loss']!r}, but {replay.losses[step]!r} was recorded")
        return None

    def line(self, account: StepAccount, arrangement: tuple[RunConfig, Layout, Placement]) -> dict[str, Any]:
        """Of the ledger; with what is new, if this is the first one of its generation."""
        step, batch = account.step, account.batch
        digest = digest_text(combine(report.digests[0] for report in account.reports))
        line = LedgerLine(step, account.generation, order.first_position(self._config.training, step), len(batch.valid), digest,
                          account.losses["loss"])
        change = generation_record(*arrangement) if account.generation != self._written else {}
        return asdict(line) | change

    def committed(self, account: StepAccount) -> None:
        """Its line is durable: what was reported of others is of no use any more."""
        self._written = account.generation
        self._reports.clear()
