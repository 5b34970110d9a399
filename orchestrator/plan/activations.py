"""What a stage keeps of a token from forward to backward, in closed form: every tensor that an operation saves, and no more.

Terms are named by what saves them (actors/model). Indices of the exchange and of the gate are counted; what is freed between two
segments is not. `selective` recomputation makes norms, up-projections and SwiGLU outputs again (DeepSeek-V3 report, section 3.2.3);
`full` keeps the inputs of segments alone. In FP8 what products keep of their inputs is one byte a value and a scale for 128.
"""

from __future__ import annotations

from orchestrator.config.run_config import RunConfig
from orchestrator.model.parameters import moe_layers

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_FP8 = 1 + 4 / 128
_INDEX = 8


def bytes_per_token(config: RunConfig, layers: range, *, last: bool) -> float:
    """Of one stage. Attention's padding of values on CPUs is left out."""
    model, keeper = config.model, _Keeper(config)
    with_experts = moe_layers(model, layers, last=last)
    found = len(with_experts) * keeper.layer(moe=True) + sum(not model.is_moe(n) for n in layers) * keeper.layer(moe=False)
    if last:
        found += keeper.head() + (keeper.head() + keeper.mtp_input() if model.num_nextn_predict_layers else 0)
    return found


class _Keeper:
    """Bytes a token of parts of the model."""

    def __init__(self, config: RunConfig):
        self._model, self._precision, self._recompute = config.model, config.precision, config.training.recompute
        self._width = BYTES[config.training.dtype]
        self._exact = max(4, self._width)

    def layer(self, *, moe: bool) -> float:
        model, width = self._model, self._width
        if self._recompute == "full":  # inputs of its segments
            rows = model.num_experts_per_tok * (model.hidden_size * width + self._exact) if moe else 0
            shared = bool(model.n_shared_experts) if moe else True
            return (1 + shared) * model.hidden_size * width + rows + (self._routing() if moe else 0)
        return self._attention() + self._norm(model.hidden_size) + (self._mixture() if moe else self._dense())

    def head(self) -> float:
        """Norm, input of the head, and the logits' log-softmax."""
        model = self._model
        if self._recompute == "full":
            return model.hidden_size * self._width
        return self._norm(model.hidden_size) + self._made_again(model.hidden_size * self._width) + model.vocab_size * self._exact

    def mtp_input(self) -> float:
        model = self._model
        if self._recompute == "full":
            return 2 * model.hidden_size * self._width
        return 2 * self._norm(model.hidden_size) + self._made_again(2 * model.hidden_size * self._width)

    # --- parts of a layer ------------------------------------------------------------------------------------------------

    def _attention(self) -> float:
        """Norm, down-projections, norms of latents, up-projections, attention itself, output."""
        model, width = self._model, self._width
        heads, inner = model.num_attention_heads, model.num_attention_heads * model.v_head_dim
        float8 = self._precision.attention == "fp8"
        found = self._norm(model.hidden_size) + 2 * model.hidden_size * _FP8 if float8 else (
            self._norm(model.hidden_size) + self._made_again(model.hidden_size * width))
        if model.q_lora_rank is not None:
            found += self._norm(model.q_lora_rank) + self._input(model.q_lora_rank, float8, again=True)
        kept = model.kv_lora_rank + model.qk_rope_head_dim
        found += kept * width + self._exact + self._input(model.kv_lora_rank, float8, again=True)
        found += self._made_again((2 * heads * model.qk_head_dim + inner) * width)  # queries, keys, values
        return found + inner * width + heads * 4 + self._input(inner, float8)

    def _mixture(self) -> float:
        """Gate, shared expert, routed experts; its input is one tensor for the first two."""
        model, width, copies = self._model, self._width, self._model.num_experts_per_tok
        found = self._made_again(model.hidden_size * width) + self._routing() + copies * self._exact
        if model.n_shared_experts:
            found += self._mlp(model.moe_intermediate_size * model.n_shared_experts, self._precision.shared_experts == "fp8")
        experts = self._precision.experts == "fp8"
        rows = model.hidden_size * (_FP8 if experts else width)
        return found + copies * (rows + self._mlp(model.moe_intermediate_size, experts, counted=True))

    def _dense(self) -> float:
        float8 = self._precision.mlp == "fp8"
        normed = 0 if float8 else self._made_again(self._model.hidden_size * self._width)
        return normed + self._mlp(self._model.intermediate_size, float8)

    def _mlp(self, inner: int, float8: bool, *, counted: bool = False) -> float:
        """Between its input, which FP8 keeps a copy of unless it is `counted`, and its output."""
        if float8:
            return 2 * inner * _FP8 + (0 if counted else self._model.hidden_size * _FP8)
        return 2 * inner * self._width + self._made_again(inner * self._width)

    def _routing(self) -> float:
        """Affinities, weights and indices of choices, and where their rows are."""
        model, chosen = self._model, self._model.num_experts_per_tok
        affinities = model.n_routed_experts * self._exact * (self._recompute != "full")
        return affinities + chosen * (2 * self._exact + 5 * _INDEX)

    # --- small things ----------------------------------------------------------------------------------------------------

    def _norm(self, values: int) -> float:
        """What a norm keeps: its input, and one over its root mean square."""
        return values * self._width + self._exact

    def _input(self, values: int, float8: bool, *, again: bool = False) -> float:
        """What a product keeps; again: it can be made again."""
        if float8:
            return values * _FP8
        return self._made_again(values * self._width) if again else values * self._width

    def _made_again(self, size: float) -> float:
        return 0 if self._recompute == "selective" else size
