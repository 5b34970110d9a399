"""What a stage knows of one microbatch: its data, its results, and what forward keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.comm.exchange import Dispatched, Handle
from actors.model.island import Island
from actors.model.recompute import Recipes


@dataclass(frozen=True, slots=True)
class LossScales:
    """Factors of the three loss sums in what is differentiated: weights already divided by the global batch's counts."""

    next_token: float = 1.0
    mtp: float = 0.0
    balance: float = 0.0


@dataclass(slots=True)
class Record:
    """One layer's share of a tape: islands waiting for their backward, and tensors on their way to the next segment."""

    attention: Island | None = None
    mlp: Island | None = None
    recipes: Recipes | None = None
    choice_tk: Tensor | None = None
    weight_tk: Tensor | None = None
    normed: Tensor | None = None
    dispatched: Dispatched | None = None
    handle: Handle | None = None
    rows: Tensor | None = None
    row_weights: Tensor | None = None
    shared: Tensor | None = None


@dataclass(slots=True)
class Microbatch:
    """The tape of one microbatch on one stage. Everything but data and results is gone after its backward.

    Args:
        sequences, length: b (0: empty; takes part in the exchanges only) and positions s of the microbatch.
        tokens: int64 [b, s+1]; needed on the first and the last stage. Position i predicts token i+1.
        valid: int64 [b], real tokens in each row of `tokens`; labels behind them do not count. None: all are real.
        keep: False for evaluation: no backward follows, losses are still summed.
        input, output: [b, s, h] activations from and to the neighbouring stages; None where there is none, or b is 0.
        output_gradient, input_gradient: their gradients.
    Sums over the microbatch, not divided by any count (float64 scalars where this stage computes them):
        loss_sum: cross-entropy of next tokens, in nats. mtp_loss_sum: the same of the token after it.
        balance_loss_sum: over the sequences and this stage's layers with experts.
    """

    sequences: int
    length: int
    tokens: Tensor | None = None
    valid: Tensor | None = None
    keep: bool = True
    input: Tensor | None = None
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    input_gradient: Tensor | None = None
    loss_sum: Tensor | float = 0.0
    mtp_loss_sum: Tensor | float = 0.0
    balance_loss_sum: Tensor | float = 0.0

    hidden: Tensor | None = field(default=None, repr=False)
    gradient: Tensor | None = field(default=None, repr=False)
    records: dict[int, Record] = field(default_factory=dict, repr=False)
    islands: dict[str, Island] = field(default_factory=dict, repr=False)

    def labels(self, ahead: int) -> Tensor:
        """int64 [b, s]: the token `ahead` positions on, -100 (torch's index to ignore) where there is none."""
        targets = self.tokens[:, ahead:]
        if self.valid is not None:
            position = torch.arange(ahead, self.length + 1, device=targets.device)
            targets = targets.masked_fill(position >= self.valid.unsqueeze(1), -100)
        return torch.nn.functional.pad(targets, (0, ahead - 1), value=-100)
