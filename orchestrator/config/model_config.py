"""The section `model:`: DeepSeek-V3's own keys, and what they cannot be together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.config.section import Real, Section
from orchestrator.refusal import ConfigError


class RopeScaling(Section):
    """YaRN, as in DeepSeek-V3's `rope_scaling` (report, section 4.3)."""

    type: Literal["yarn"] = "yarn"
    factor: Real = Field(gt=1.0)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: Real = Field(32.0, gt=0)
    beta_slow: Real = Field(1.0, gt=0)
    mscale: Real = Field(1.0, ge=0)
    mscale_all_dim: Real = Field(1.0, ge=0)


class ModelConfig(Section):
    """DeepSeek-V3's own keys. The defaults are the tiny model that runs anywhere."""

    vocab_size: int = Field(257, gt=1)
    hidden_size: int = Field(128, gt=0)
    num_hidden_layers: int = Field(4, gt=0)
    first_k_dense_replace: int = Field(1, ge=0, description="leading layers with a dense MLP")
    intermediate_size: int = Field(256, gt=0)
    moe_intermediate_size: int = Field(64, gt=0)
    n_routed_experts: int = Field(16, gt=0)
    n_shared_experts: int = Field(1, ge=0)
    num_experts_per_tok: int = Field(4, gt=0)
    n_group: int = Field(4, gt=0)
    topk_group: int = Field(2, gt=0)
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: Real = Field(2.5, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    q_lora_rank: int | None = Field(64, gt=0, description="null: queries are projected directly")
    kv_lora_rank: int = Field(32, gt=0)
    qk_nope_head_dim: int = Field(32, gt=0)
    qk_rope_head_dim: int = Field(16, gt=0)
    v_head_dim: int = Field(32, gt=0)
    num_nextn_predict_layers: int = Field(1, ge=0, le=1, description="depth of multi-token prediction")
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Real = Field(1e-6, gt=0)
    rope_theta: Real = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = Field(4096, gt=0)
    initializer_range: Real = Field(0.006, gt=0, description="standard deviation of every weight matrix at the start")
    tie_word_embeddings: Literal[False] = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts; the multi-token-prediction layer always has."""
        return layer >= self.first_k_dense_replace


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError for the first that fails."""
    if model.n_routed_experts % model.n_group:
        raise ConfigError("model.n_group", model.n_group, f"a divisor of model.n_routed_experts = {model.n_routed_experts}")
    if model.topk_group > model.n_group:
        raise ConfigError("model.topk_group", model.topk_group, f"at most model.n_group = {model.n_group}")
    reachable = model.topk_group * model.experts_per_group
    if model.num_experts_per_tok > reachable:
        raise ConfigError("model.num_experts_per_tok", model.num_experts_per_tok,
                          f"at most {reachable}, the experts of model.topk_group = {model.topk_group} groups")
    if model.n_group > 1 and model.experts_per_group < 2:
        raise ConfigError("model.n_group", model.n_group,
                          f"at most {model.n_routed_experts // 2}: a group is scored by its two best experts")
    if model.qk_rope_head_dim % 2:
        raise ConfigError("model.qk_rope_head_dim", model.qk_rope_head_dim, "an even number: rotary pairs")
    if model.first_k_dense_replace > model.num_hidden_layers:
        raise ConfigError("model.first_k_dense_replace", model.first_k_dense_replace,
                          f"at most model.num_hidden_layers = {model.num_hidden_layers}")
