"""How many positions and microbatches a kind of schedule takes, and how others are refused."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.refusal import ConfigError


@dataclass(frozen=True, slots=True)
class Sizes:
    """least: microbatches a pipeline of one position takes at least. each: at least so many microbatches a position, in a
    longer pipeline (0: one is enough). even: in a longer pipeline both numbers are even, since there are two directions."""

    kind: str
    least: int = 1
    each: int = 0
    even: bool = False

    def check(self, positions: int, microbatches: int) -> None:
        """Raises ConfigError (a ValueError) with key `positions` or `microbatches`: not a number that the kind takes."""
        least = self.smallest(positions, 1)
        even = self.even and positions > 1
        if microbatches < least or (even and microbatches % 2):
            why = f" ({self.each} x positions)" if self.each and positions > 1 else ""
            wanted = f"an even number, at least {least}" if even else f"at least {least}"
            raise ConfigError("microbatches", microbatches, f"{self.kind} takes {wanted}{why}")

    def smallest(self, positions: int, wanted: int) -> int:
        """The smallest number of microbatches that the kind takes and that is at least `wanted`.

        Raises ConfigError with key `positions`.
        """
        if positions < 1 or (self.even and positions > 1 and positions % 2):
            allowed = "1 or an even number" if self.even else "at least 1"
            raise ConfigError("positions", positions, f"{self.kind} takes {allowed}")
        enough = max(wanted, self.least if positions == 1 else max(1, self.each * positions))
        return enough + enough % 2 if self.even and positions > 1 else enough
