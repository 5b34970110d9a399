"""torch's pipeline schedules as text, one line a position: the same schedules, written by others.

torch's classes are built around stages that hold modules; of a stage, the order of actions needs its numbers alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.distributed.pipelining import schedules

from orchestrator.schedule.ir.stages import Stages


def torch_rows(name: str, stages: Stages, microbatches: int) -> list[str]:
    """What torch's class `name` runs, in this repository's words. Raises ValueError: numbers that torch refuses."""
    order = _order(getattr(schedules, name), stages, microbatches)
    slot_of = {stage: slot for position in range(stages.positions) for slot, stage in enumerate(stages.hosted(position))}

    def word(action: schedules._Action) -> str:
        if action.sub_actions:
            return "|".join(map(word, action.sub_actions))
        return f"{action.computation_type.value}{slot_of[action.stage_index]}.{action.microbatch_index}"

    kept = ([a for a in order[rank] if a is not None and a.computation_type != "REDUCE_GRAD"] for rank in sorted(order))
    return [",".join(map(word, row)) for row in kept]


def _order(schedule: type, stages: Stages, microbatches: int) -> dict[int, list[schedules._Action | None]]:
    hosted = [_stage(stages, stage) for stage in stages.hosted(0)]
    if issubclass(schedule, schedules.PipelineScheduleSingle):
        return schedule(hosted[0], microbatches)._get_pipeline_order()
    return schedule(hosted, microbatches).pipeline_order


def _stage(stages: Stages, stage: int) -> SimpleNamespace:
    return SimpleNamespace(
        num_stages=stages.count, group_size=stages.positions, group_rank=0, stage_index=stage, device=torch.device("cpu"),
        is_first=stage == 0, is_last=stage == stages.count - 1, submod=torch.nn.Identity(), has_backward=True)
