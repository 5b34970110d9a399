"""What a model is told: the keys of DeepSeek-V3's `config.json`, with the same meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt
from pydantic import Field

from orchestrator.config.section import Channels, Experts, Groups, Heads, Layers, Number, Section, Tokens
from orchestrator.refusal import ConfigError


class RopeScaling(Section):
    """YaRN, as in DeepSeek-V3's `rope_scaling` (report, section 4.3)."""

    type: Literal["yarn"] = Field("yarn", description="how frequencies are scaled: YaRN is the one way that there is")
    factor: Number = Field(gt=1.0, description="how many times the original length is reached")
    original_max_position_embeddings: Tokens = Field(gt=0, description="longest sequence before the scaling")
    beta_fast: Number = Field(32.0, gt=0, description="pairs that turn more often within the original length keep their frequency")
    beta_slow: Number = Field(
        1.0, gt=0, description="pairs that turn less often have theirs divided by factor; between them, in part")
    mscale: Number = Field(
        1.0, ge=0, description="rotated channels grow by 1 + 0.1 mscale ln(factor), divided by the same of mscale_all_dim; "
                               "without either, by 1 + 0.1 ln(factor)")
    mscale_all_dim: Number = Field(
        1.0, ge=0, description="attention scores grow by the square of 1 + 0.1 mscale_all_dim ln(factor)")


class ModelConfig(Section):
    """DeepSeek-V3's own keys. The defaults are the tiny model that runs anywhere."""

    vocab_size: Tokens = Field(257, gt=1, description="token ids that there are")
    hidden_size: Channels = Field(128, gt=0, description="of the hidden state that goes from layer to layer")
    num_hidden_layers: Layers = Field(4, gt=0, description="decoder layers; that of multi-token prediction comes on top")
    first_k_dense_replace: Layers = Field(1, ge=0, description="leading layers with a dense MLP")
    intermediate_size: Channels = Field(256, gt=0, description="inside a dense MLP")
    moe_intermediate_size: Channels = Field(64, gt=0, description="inside each expert")
    n_routed_experts: Experts = Field(16, gt=0, description="of a layer, that its gate chooses from")
    n_shared_experts: Experts = Field(1, ge=0, description="of a layer, that every token passes")
    num_experts_per_tok: Experts = Field(4, gt=0, description="that a token is sent to")
    n_group: Groups = Field(
        4, gt=0, description="that the experts of a layer are divided into; placement keeps a group on one node")
    topk_group: Groups = Field(2, gt=0, description="whose experts a token may be sent to")
    scoring_func: Literal["sigmoid"] = Field("sigmoid", description="what makes the gate's products affinities")
    topk_method: Literal["noaux_tc"] = Field(
        "noaux_tc", description="experts are chosen by affinity and a bias that evens their load, within the best groups")
    norm_topk_prob: bool = Field(True, description="whether the weights of a token's experts are scaled to the same sum")
    routed_scaling_factor: Number = Field(2.5, gt=0, description="what the weights of a token's experts are multiplied by")
    num_attention_heads: Heads = Field(4, gt=0, description="of every layer's attention")
    q_lora_rank: Annotated[Channels, Gt(0)] | None = Field(
        64, description="of compressed queries; null: queries are projected directly")
    kv_lora_rank: Channels = Field(32, gt=0, description="of compressed keys and values")
    qk_nope_head_dim: Channels = Field(32, gt=0, description="of a head's queries and keys that are not rotated")
    qk_rope_head_dim: Channels = Field(
        16, gt=0, description="of a head's queries and keys that are rotated by position: an even number")
    v_head_dim: Channels = Field(32, gt=0, description="of a head's values")
    num_nextn_predict_layers: Layers = Field(1, ge=0, le=1, description="depth of multi-token prediction")
    hidden_act: Literal["silu"] = Field("silu", description="activation of MLPs and experts, gated (SwiGLU)")
    rms_norm_eps: Number = Field(1e-6, gt=0, description="what norms add to the mean square")
    rope_theta: Number = Field(10000.0, gt=0, description="base of the frequencies of rotation")
    rope_scaling: RopeScaling | None = Field(
        None, description="for sequences longer than those the frequencies are made for; null: none")
    max_position_embeddings: Tokens = Field(4096, gt=0, description="longest sequence; data.sequence_length may not be above it")
    initializer_range: Number = Field(0.006, gt=0, description="standard deviation of every weight matrix at the start")
    tie_word_embeddings: Literal[False] = Field(False, description="embedding and head are two matrices")

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
