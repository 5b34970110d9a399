"""What a stage knows of one microbatch: its data, its results, and what forward keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.comm.exchange import Dispatched, Handle, PendingDispatch
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
    """One layer's share of a tape: islands waiting for their backward, and tensors on their way to the next segment.

    `mlp` is of the routed experts, `shared_mlp` of the shared one.
    """

    attention: Island | None = None
    mlp: Island | None = None
    shared_mlp: Island | None = None
    recipes: Recipes | None = None
    choice_tk: Tensor | None = None
    weight_tk: Tensor | None = None
    normed: Tensor | None = None
    announced: PendingDispatch | None = None
    dispatched: Dispatched | None = None
    handle: Handle | None = None
    rows: Tensor | None = None
    row_weights: Tensor | None = None
    shared: Tensor | None = None


@dataclass(slots=True)
class Microbatch:
    """The tape of one microbatch on one stage. Everything but data and results is gone after its backward.

    Its segments run one after the other, on two threads: exchanges on a lane of their own. Only the shared expert may run while
    its layer's exchange does; the fields of the `Record` that either writes, the other leaves alone.
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
        correct, accepted: only where `keep` is False: next tokens that are the likeliest ones; and tokens after them of which
            multi-token prediction says the same as the model itself one position on, so that speculation would be accepted.
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
    correct: Tensor | int = 0
    accepted: Tensor | int = 0

    predicted: Tensor | None = field(default=None, repr=False)
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

    # --- in two parts: what the halves work on, and what becomes of it -----------------------------------------------

    def halves(self) -> tuple[Microbatch, Microbatch]:
        """Two microbatches of this one's sequences, the larger first. Always two: where this one has a single sequence, or
        none, others of the EP group may have more, and each half takes part in their exchanges."""
        first = -(-self.sequences // 2)
        return self._part(0, first), self._part(first, self.sequences)

    def _part(self, start: int, stop: int) -> Microbatch:
        tokens, valid = (None if rows is None else rows[start:stop] for rows in (self.tokens, self.valid))
        return Microbatch(sequences=stop - start, length=self.length, tokens=tokens, valid=valid, keep=self.keep)

    def share_input(self, parts: Sequence[Microbatch]) -> None:
        """Give each part its rows of the input."""
        for part, rows in zip(parts, _shared(self.input, parts)):
            part.input = rows
        self.input = None

    def share_output_gradient(self, parts: Sequence[Microbatch]) -> None:
        """Give each part its rows of the output's gradient."""
        for part, rows in zip(parts, _shared(self.output_gradient, parts)):
            part.output_gradient = rows
        self.output_gradient = None

    def join_forward(self, parts: Sequence[Microbatch]) -> None:
        """Take the output and the loss sums of the parts."""
        self.output = _joined([part.output for part in parts])
        for part in parts:
            self.loss_sum = self.loss_sum + part.loss_sum
            self.mtp_loss_sum = self.mtp_loss_sum + part.mtp_loss_sum
            self.balance_loss_sum = self.balance_loss_sum + part.balance_loss_sum
            self.correct, self.accepted = self.correct + part.correct, self.accepted + part.accepted
            part.output = None

    def join_backward(self, parts: Sequence[Microbatch]) -> None:
        """Take the gradient of the input of the parts."""
        self.input_gradient = _joined([part.input_gradient for part in parts])


def _shared(whole: Tensor | None, parts: Sequence[Microbatch]) -> Sequence[Tensor | None]:
    """Rows of each part; None for a part without sequences."""
    if whole is None:
        return (None,) * len(parts)
    rows = whole.split([part.sequences for part in parts])
    return [found if part.sequences else None for found, part in zip(rows, parts)]


def _joined(rows: Sequence[Tensor | None]) -> Tensor | None:
    """All rows there are, in order."""
    found = [part for part in rows if part is not None]
    return found[0] if len(found) == 1 else torch.cat(found) if found else None
