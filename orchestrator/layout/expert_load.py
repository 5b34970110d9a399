"""How often experts were chosen lately: what a placement is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExpertLoad:
    """A mean over the last steps, of tokens that chose each expert in a step, by layer.

    A step's weight falls by the factor 1 - 1 / steps with every step after it, so the mean forgets within about `steps` steps.
    """

    steps: int
    mean: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    weight: float = 0.0

    def after(self, load: Mapping[int, Sequence[float]]) -> ExpertLoad:
        """With one more step. A layer that the step does not have keeps the mean that it had."""
        old = self.weight * (1 - 1 / self.steps)
        mean = dict(self.mean)
        for layer, counts in load.items():
            before = mean.get(layer, (0.0,) * len(counts))
            mean[layer] = tuple((old * b + c) / (old + 1) for b, c in zip(before, counts, strict=True))
        return ExpertLoad(self.steps, mean, old + 1)
