"""What every section of the configuration is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _real(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 and 2.2e5 (without a dot, without a sign) as text; a person means a number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


Real = Annotated[float, BeforeValidator(_real)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
