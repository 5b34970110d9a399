"""The training recipe as a pure function of the step: the learning rate."""

from __future__ import annotations

import math

from orchestrator.config.run_config import OptimizerSection


def learning_rate(settings: OptimizerSection, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear warm-up, constant, cosine to the final rate at the end.

    The shape is DeepSeek-V3's (report, section 4.2), counted in steps.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    begin = settings.warmup_steps + settings.constant_steps
    if step < begin or steps <= begin:
        return settings.learning_rate
    progress = min(1.0, (step - begin) / max(1, steps - 1 - begin))
    low, high = settings.final_learning_rate, settings.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
