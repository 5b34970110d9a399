"""In what numbers each kind of module holds its weights and multiplies: a policy, and what of it makes no sense.

Source of the kinds and of `fp8`: DeepSeek-V3 report, section 3.3: linear layers of attention and MLPs in FP8; embedding, head, gate
and norms in higher precision; attention itself, which has no weights, computes in `training.dtype`.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from orchestrator.config.section import Section
from orchestrator.refusal import ConfigError

Format = Literal["same", "bf16", "fp8", "fp32"]
KINDS = ("attention", "mlp", "experts", "shared_experts", "mtp_projection", "embedding", "head", "gate", "norms")
PRODUCTS = KINDS[:4]
"""The kinds whose products may be in FP8."""

_OF_WEIGHT = (  # the first that matches
    (re.compile(r"norm\.weight$|\.[eh]norm\.weight$"), "norms"), (re.compile(r"\.mlp\.experts\."), "experts"),
    (re.compile(r"\.mlp\.shared_experts\."), "shared_experts"), (re.compile(r"\.mlp\.gate\.weight$"), "gate"),
    (re.compile(r"\.mlp\."), "mlp"), (re.compile(r"\.self_attn\."), "attention"), (re.compile(r"\.eh_proj\."), "mtp_projection"),
    (re.compile(r"embed_tokens"), "embedding"), (re.compile(r"lm_head"), "head"))
_NO_FP8 = {
    "mtp_projection": "it is published in BF16", "embedding": "rows are looked up in it, nothing is multiplied",
    "head": "the loss is taken of what it gives", "gate": "its choice of experts would change with the rounding",
    "norms": "they multiply vectors, which costs next to nothing"}


class PrecisionSection(Section):
    """same: as `training.dtype`. fp8: weights in FP32, rounded for every product. fp32: weights and products in FP32."""

    attention: Format = Field("same", description="projections of queries, keys, values and output")
    mlp: Format = Field("same", description="of layers without experts")
    experts: Format = Field("same", description="routed experts")
    shared_experts: Format = Field("same", description="those that every token passes")
    mtp_projection: Format = Field("same", description="what joins embedding and hidden state for multi-token prediction")
    embedding: Format = Field("same", description="not fp8: rows are looked up in it, nothing is multiplied")
    head: Format = Field("same", description="not fp8: the loss is taken of what it gives")
    gate: Format = Field("fp32", description="fp32 only: rounding it costs accuracy and saves nothing")
    norms: Format = Field("fp32", description="fp32 only, as the gate")
    scales: Literal["tiles", "tensor"] = Field(
        "tiles", description="of FP8 numbers: one for each tile of 128, or for a whole tensor")
    gradients: Literal["e4m3", "e5m2"] = Field("e4m3", description="format of output gradients in FP8 products")
    accumulation: Literal["fp32", "14bit"] = Field("fp32", description="of FP8 products; 14bit: as FP8 units that are not promoted")


def kind_of(weight: str) -> str:
    """The kind of module that a weight belongs to, by its published name."""
    return next(kind for pattern, kind in _OF_WEIGHT if pattern.search(weight))


def exact(precision: PrecisionSection, weight: str) -> bool:
    """Whether working weights are FP32 (FP64 in float64 runs): cast to what the products take only there."""
    return getattr(precision, kind_of(weight)) in ("fp8", "fp32")


def check_precision(precision: PrecisionSection, dtype: str) -> None:
    """dtype: `training.dtype`. Raises ConfigError for the first setting that makes no sense."""
    for kind in KINDS:
        form = getattr(precision, kind)
        if form == "fp8" and kind in _NO_FP8:
            raise ConfigError(f"precision.{kind}", form, f"same, bf16 or fp32: {_NO_FP8[kind]}")
        if kind in ("gate", "norms") and form != "fp32":
            raise ConfigError(f"precision.{kind}", form, "fp32: rounding it costs accuracy and saves nothing")
        if form == "bf16" and dtype != "bfloat16":
            raise ConfigError(f"precision.{kind}", form, f"same, fp8 or fp32: activations are training.dtype = {dtype}, and would be "
                                                         "rounded on the way in alone")
        if form in ("fp8", "fp32") and dtype == "float64" and kind not in ("gate", "norms"):
            raise ConfigError(f"precision.{kind}", form, "same: training.dtype = float64 is for comparing, to the last digit")
    if not any(getattr(precision, kind) == "fp8" for kind in PRODUCTS):
        for key, published in (("scales", "tiles"), ("gradients", "e4m3"), ("accumulation", "fp32")):
            if getattr(precision, key) != published:
                raise ConfigError(f"precision.{key}", getattr(precision, key), f"{published}: no kind of module is fp8")
