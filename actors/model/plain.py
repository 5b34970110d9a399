"""The same model as one ordinary PyTorch module: torch parameters, autograd, no pipeline, no exchange.

The peer that the runtime is compared with, in results and in speed. It shares the configuration, the names and the initial
values of weights with the rest of this folder, and no operation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.model.weights import initial_value
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import mtp_layer, stage_parameters


class PlainModel(nn.Module):
    """Parameters by published name in `named`; gate biases by layer in `biases`, counts of chosen experts in `counts`."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, seed: int):
        super().__init__()
        self.config, self.dtype = model, dtype
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.named: dict[str, nn.Parameter] = {}
        for spec in stage_parameters(model, range(model.num_hidden_layers), first=True, last=True):
            value = initial_value(spec.name, spec.shape, seed, model.initializer_range)
            parameter = nn.Parameter(value.to(self.exact if spec.precise else dtype))
            self.named[spec.name] = parameter
            self.register_parameter(spec.name.replace(".", "/"), parameter)
        self.mtp = mtp_layer(model) if model.num_nextn_predict_layers else None
        layers = [n for n in range(model.num_hidden_layers) if model.is_moe(n)]
        self.biases = {n: torch.zeros(model.n_routed_experts, dtype=self.exact) for n in layers + [self.mtp] if n is not None}
        self.counts = {n: torch.zeros(model.n_routed_experts, dtype=torch.int64) for n in self.biases}

    def losses(self, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of cross-entropy, of the second token's cross-entropy, and of the balance loss.

        tokens int64 [b, s+1]; valid int64 [b]: real tokens per row, labels behind them are left out.
        """
        balances: list[Tensor] = []
        hidden = self._hidden(tokens[:, :-1], balances)
        loss = self._loss(self._weight_product(hidden, "lm_head"), tokens, valid, 1)
        if self.mtp is None:
            return loss, loss.new_zeros(()), self._total(balances)
        prefix = f"model.layers.{self.mtp}."
        following = F.embedding(tokens[:, 1:], self.named["model.embed_tokens.weight"])
        both = torch.cat([self._norm(following, prefix + "enorm"), self._norm(hidden, prefix + "hnorm")], dim=-1)
        second = self._layer(self._weight_product(both, prefix + "eh_proj"), self.mtp, balances)
        logits = self._weight_product(self._norm(second, prefix + "shared_head.norm"), "lm_head")
        return loss, self._loss(logits, tokens, valid, 2), self._total(balances)

    def logits(self, tokens: Tensor) -> Tensor:
        """[b, s] to [b, s, vocabulary]."""
        return self._weight_product(self._hidden(tokens, []), "lm_head")

    def load(self) -> dict[int, Tensor]:
        """Per layer: how often each expert was chosen since the last update of the bias."""
        return self.counts

    def update_bias(self, speed: float) -> None:
        """Overloaded experts become less likely, others more; counting begins anew."""
        for n, count in self.counts.items():
            self.biases[n] += speed * torch.sign(count.double().mean() - count).to(self.exact)
            count.zero_()

    # --- layers --------------------------------------------------------------------------------------------------

    def _hidden(self, tokens: Tensor, balances: list[Tensor]) -> Tensor:
        x = F.embedding(tokens, self.named["model.embed_tokens.weight"])
        for n in range(self.config.num_hidden_layers):
            x = self._layer(x, n, balances)
        return self._norm(x, "model.norm")

    def _layer(self, x: Tensor, n: int, balances: list[Tensor]) -> Tensor:
        prefix = f"model.layers.{n}."
        x = x + self._attention(self._norm(x, prefix + "input_layernorm"), prefix + "self_attn.")
        y = self._norm(x, prefix + "post_attention_layernorm")
        return x + (self._mixture(y, n, balances) if n in self.biases else self._mlp(y, prefix + "mlp"))

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        c, (b, s, _) = self.config, x.shape
        heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        if c.q_lora_rank is None:
            q = self._weight_product(x, prefix + "q_proj")
        else:
            latent = self._norm(self._weight_product(x, prefix + "q_a_proj"), prefix + "q_a_layernorm")
            q = self._weight_product(latent, prefix + "q_b_proj")
        q_nope, q_rope = q.view(b, s, heads, nope + rope).transpose(1, 2).split([nope, rope], dim=-1)
        latent, k_rope = self._weight_product(x, prefix + "kv_a_proj_with_mqa").split([c.kv_lora_rank, rope], dim=-1)
        kv = self._weight_product(self._norm(latent, prefix + "kv_a_layernorm"), prefix + "kv_b_proj")
        k_nope, v = kv.view(b, s, heads, nope + c.v_head_dim).transpose(1, 2).split([nope, c.v_head_dim], dim=-1)
        cos, sin = self._rope(s, x)
        q = torch.cat([q_nope, _turn(q_rope, cos, sin)], dim=-1)
        k = torch.cat([k_nope, _turn(k_rope.unsqueeze(1), cos, sin).expand(-1, heads, -1, -1)], dim=-1)
        padding = max(nope + rope - c.v_head_dim, 0)  # as wide as the keys: torch's fused attention on a CPU wants that
        scale = (nope + rope) ** -0.5
        if c.rope_scaling and c.rope_scaling.mscale_all_dim:
            scale *= (0.1 * c.rope_scaling.mscale_all_dim * math.log(c.rope_scaling.factor) + 1) ** 2
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, padding)), is_causal=True, scale=scale)
        return self._weight_product(out[..., : c.v_head_dim].transpose(1, 2).flatten(2), prefix + "o_proj")

    def _rope(self, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [s, rope / 2]. With YaRN: pairs that turn rarely are slowed down, those that turn often are not."""
        c, yarn = self.config, self.config.rope_scaling
        pairs = torch.arange(c.qk_rope_head_dim // 2, dtype=torch.float64)
        speed, size = 1.0 / c.rope_theta ** (2 * pairs / c.qk_rope_head_dim), 1.0
        if yarn:
            def edge(turns: float) -> float:
                angle = math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns))
                return c.qk_rope_head_dim * angle / (2 * math.log(c.rope_theta))

            low, high = max(math.floor(edge(yarn.beta_fast)), 0), min(math.ceil(edge(yarn.beta_slow)), c.qk_rope_head_dim - 1)
            kept = 1 - ((pairs - low) / (high - low if high > low else 0.001)).clamp(0, 1)
            speed = kept * speed + (1 - kept) * speed / yarn.factor
            grown = [0.1 * m * math.log(yarn.factor) + 1 for m in (yarn.mscale, yarn.mscale_all_dim)]
            size = grown[0] / grown[1] if yarn.mscale and yarn.mscale_all_dim else 0.1 * math.log(yarn.factor) + 1
        angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * speed
        return (angle.cos() * size).to(x), (angle.sin() * size).to(x)

    def _mixture(self, x: Tensor, n: int, balances: list[Tensor]) -> Tensor:
        c, prefix, flat = self.config, f"model.layers.{n}.mlp.", x.flatten(0, 1)
        scores = torch.sigmoid(F.linear(flat.to(self.exact), self.named[prefix + "gate.weight"]))
        chosen = self._choose(scores.detach() + self.biases[n])
        weight = scores.gather(1, chosen)
        if c.norm_topk_prob:
            weight = weight / (weight.sum(1, keepdim=True) + 1e-20)
        weight = weight * c.routed_scaling_factor
        balances.append(self._balance(scores.view(*x.shape[:2], -1)))
        if self.training:
            self.counts[n] += torch.bincount(chosen.flatten(), minlength=c.n_routed_experts)
        out = self._mlp(flat, prefix + "shared_experts") if c.n_shared_experts else torch.zeros_like(flat)
        order = chosen.flatten().argsort()
        tokens, sizes = order // c.num_experts_per_tok, torch.bincount(chosen.flatten(), minlength=c.n_routed_experts).tolist()
        rows = [self._mlp(part, f"{prefix}experts.{e}") for e, part in enumerate(flat[tokens].split(sizes)) if len(part)]
        rows = torch.cat(rows) * weight.flatten()[order].unsqueeze(1).to(x.dtype)
        return out.index_add(0, tokens, rows).view_as(x)

    def _choose(self, biased: Tensor) -> Tensor:
        c = self.config
        grouped = biased.unflatten(1, (c.n_group, -1))
        if c.n_group > 1:
            best = grouped.sort(dim=2, descending=True)[0][..., :2].sum(2)
            rank = best.argsort(dim=1, descending=True).argsort(dim=1)
            grouped = grouped.where((rank < c.topk_group).unsqueeze(2), -torch.inf)
        return grouped.flatten(1).topk(c.num_experts_per_tok)[1]

    def _balance(self, scores: Tensor) -> Tensor:
        """Sum over sequences of sum_i f_i P_i."""
        experts, k = self.config.n_routed_experts, self.config.num_experts_per_tok
        hit = torch.zeros_like(scores).scatter(2, scores.detach().topk(k, dim=2)[1], 1.0)
        return (hit.mean(1) * experts / k * (scores / scores.sum(2, keepdim=True)).mean(1)).sum()

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        hidden = F.silu(self._weight_product(x, name + ".gate_proj")) * self._weight_product(x, name + ".up_proj")
        return self._weight_product(hidden, name + ".down_proj")

    # --- small things --------------------------------------------------------------------------------------------

    def _weight_product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.named[name + ".weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x.to(self.exact), x.shape[-1:], self.named[name + ".weight"], self.config.rms_norm_eps).to(x.dtype)

    def _loss(self, logits: Tensor, tokens: Tensor, valid: Tensor | None, ahead: int) -> Tensor:
        labels = tokens[:, ahead:].clone()
        if valid is not None:
            for row, count in zip(labels, valid.tolist()):
                row[max(count - ahead, 0) :] = -100
        kept = logits[:, : labels.shape[1]].flatten(0, 1).to(self.exact)
        return F.cross_entropy(kept, labels.flatten(), ignore_index=-100, reduction="sum")

    def _total(self, balances: list[Tensor]) -> Tensor:
        return torch.stack(balances).sum() if balances else torch.zeros((), dtype=self.exact)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ...; evens then odds in the result, for queries and keys alike."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
