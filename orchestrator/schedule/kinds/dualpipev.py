"""DualPipeV: one half of a DualPipe pipeline, whose two directions are the legs of a V.

Position r of n hosts stage r (slot 0) and stage 2n-1-r (slot 1); microbatches enter and leave at position 0. Its rows are
rows 0..n-1 of DualPipe with 2n positions and twice the microbatches, so bubble and peak are that one's too:
(n - 1)(F&B + B - 3W) where I = F, with F and B of one stage, and 2n+1 microbatches of one stage.
Source: the released `dualpipev.py`; Sea AI Lab, "DualPipe could be better without the Dual".
"""

from __future__ import annotations

from orchestrator.schedule.ir.actions import Row
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.kinds.dualpipe import eight_steps
from orchestrator.schedule.kinds.writer import RowWriter


def dualpipev(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """The rows of a step of `microbatches`, at least two a position."""
    positions = stages.positions
    return tuple(eight_steps(RowWriter(stages, position), positions, position, 0, microbatches) for position in range(positions))
