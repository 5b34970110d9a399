"""From a batch of sequences to one request per rank: who runs which tokens in which microbatch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from actors.calls.messages import LossDivisors, PendingUpdate, StepRequest
from orchestrator.config.run_config import RunConfig
from orchestrator.data import order
from orchestrator.layout.layout import Layout
from orchestrator.plan.scheduling import dealt


@dataclass(frozen=True)
class Batch:
    """Sequences of one step in the order of the data. `tokens` int32 [n, S+1]; `valid` int32 [n], real tokens of a row."""

    step: int
    tokens: numpy.ndarray
    valid: numpy.ndarray

    @property
    def divisors(self) -> LossDivisors:
        """What every loss term of this batch is divided by, whatever the layout."""
        next_token, mtp = order.label_counts(self.valid.tolist())
        return LossDivisors(max(1, next_token), max(1, mtp), max(1, len(self.valid)))


class Dealer:
    """Requests for the ranks of one layout."""

    def __init__(self, config: RunConfig, layout: Layout):
        self._config, self._layout = config, layout

    def requests(self, batch: Batch, apply: PendingUpdate | None, *, training: bool, keep_spans: bool = False) -> list[StepRequest]:
        """One per rank, in rank order. All share the number of microbatches; only ranks with the first or last stage get
        tokens."""
        layout = self._layout
        deal = dealt(self._config, layout, len(batch.valid), training=training)
        requests = []
        for place in layout.places:
            stream = place.row * layout.width + place.width
            tokens = valid = None
            if place.position in layout.ends:
                indices = deal.of_stream(stream)
                tokens, valid = batch.tokens[indices], batch.valid[indices]
            requests.append(StepRequest(
                step=batch.step, apply=apply, microbatches=deal.microbatches,
                sizes=deal.sizes(stream, layout.folding.slots), divisors=batch.divisors, tokens=tokens, valid=valid,
                keep_spans=keep_spans))
        return requests
