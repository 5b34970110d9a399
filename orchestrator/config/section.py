"""What every section of the configuration is made of: keys that say what they mean, and numbers that say in what unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


@dataclass(frozen=True)
class Unit:
    """Of a number, beside its type: `Annotated[int, Unit("nodes")]`. `name`: empty for one that counts and measures nothing."""

    name: str


def _real(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 and 2.2e5 (without a dot, without a sign) as text; a person means a number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


Real = Annotated[float, BeforeValidator(_real)]
Number = Annotated[Real, Unit("")]
Seconds = Annotated[Real, Unit("seconds")]
Channels, Experts, Groups, Heads, Layers, Nodes, Parts, Positions, Ranks, Sequences, Steps, Tokens = (
    Annotated[int, Unit(name)] for name in ("channels", "experts", "groups", "heads", "layers", "nodes", "parts", "positions",
                                            "ranks", "sequences", "steps", "tokens"))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
