"""TensorBoard event files of a run, by torch's own writer. `metrics.jsonl` stays the source; this is a copy of what is looked at."""

from __future__ import annotations

import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from orchestrator.told import kinds
from orchestrator.told.consumers import Handlers

FOLDER = "tensorboard"
_AGAIN_SECONDS = 30.0
"""Each try leaves a file."""
_SCALARS = {
    "loss": "loss/training", "mtp_loss": "loss/mtp", "balance_loss": "loss/balance", "gradient_norm": "optimizer/gradient_norm",
    "learning_rate": "optimizer/learning_rate", "tokens_per_second": "speed/tokens_per_second", "seconds": "speed/step_seconds",
    "mfu": "speed/mfu", "overlap_ratio": "communication/overlap_ratio", "exposed_comm_seconds": "communication/exposed_seconds",
    "bubble_ratio": "pipeline/bubble_ratio", "busiest_expert": "experts/busiest_over_mean", "nodes": "elastic/nodes",
    "generation": "elastic/generation"}


class EventFiles:
    """Fed by what a trainer's `watch` says. Where a run continues, what was written of the same steps before is hidden."""

    def __init__(self, folder: str):
        self._folder, self._writer, self._again_at = folder, None, 0.0

    def observe(self, kind: str, values: Any) -> None:
        """Raises OSError and the like: it cannot be written, now."""
        try:
            self._observe(kind, values)
        except Exception:  # the writer says so for ever from then on: a later step has another one
            self._writer, self._again_at = None, time.monotonic() + _AGAIN_SECONDS
            raise

    def _observe(self, kind: str, values: Any) -> None:
        if kind == "step":
            if self._writer is None and time.monotonic() >= self._again_at:
                self._writer = SummaryWriter(self._folder, purge_step=values["step"])
            if self._writer is not None:
                for key, tag in _SCALARS.items():
                    if values.get(key) is not None:
                        self._writer.add_scalar(tag, values[key], values["step"], walltime=values["time"])
        elif kind == "event":
            self._HANDLERS(self, values)

    def _anew(self, event: kinds.GenerationLoaded | kinds.CoordinatorRestarted, time: float) -> None:
        self.close()  # state came from storage, or another coordinator wrote before
        self._writer = SummaryWriter(self._folder, purge_step=event.step)

    def _validated(self, event: kinds.Validated, time: float) -> None:
        if self._writer is not None:
            for key, value in (("loss", event.loss), ("accuracy", event.accuracy)):
                if value is not None:
                    self._writer.add_scalar(f"validation/{key}", value, event.step, walltime=time)

    _HANDLERS = Handlers({
        kinds.GenerationLoaded: _anew, kinds.CoordinatorRestarted: _anew, kinds.Validated: _validated,
    }, leaves=(
        kinds.LayoutPlanned, kinds.GenerationFormed, kinds.Resumed, kinds.StartedOver, kinds.ExpertsPlaced, kinds.RanksLost,
        kinds.Interrupted, kinds.RanksAborted, kinds.CommittedStateLost, kinds.NodesJoining, kinds.NodesDraining, kinds.NodesAwaited,
        kinds.NodeIdle, kinds.NodeBarred, kinds.Slow, kinds.SlowOver, kinds.CheckpointWritten, kinds.CheckpointFailed,
        kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway, kinds.DataAway, kinds.ControlStoreAway,
        kinds.ControlStoreBack, kinds.NotFinite, kinds.Replayed, kinds.UnknownEvent))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
