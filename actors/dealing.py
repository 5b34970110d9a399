"""From a batch of sequences to one request per rank: who runs which tokens in which microbatch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy

from actors.messages import Apply, LossDivisors, StepRequest
from orchestrator import order
from orchestrator.config import RunConfig
from orchestrator.layout import Layout
from orchestrator.schedule import dualpipe, forward_only
from orchestrator.schedule.actions import Program
from orchestrator.schedule.check import check
from orchestrator.schedule.lower import lower


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

    def requests(self, batch: Batch, apply: Apply | None, *, training: bool, keep_spans: bool = False) -> list[StepRequest]:
        """One per rank, in rank order. All share the number of microbatches; only the ends of a pipeline get tokens."""
        layout = self._layout
        smallest = (dualpipe if training else forward_only).smallest_microbatches
        dealt = order.deal(
            len(batch.valid), streams=layout.streams, pipeline=layout.pipeline,
            microbatch_sequences=self._config.training.microbatch_sequences,
            smallest_microbatches=partial(smallest, layout.pipeline))
        requests = []
        for place in layout.places:
            stream = place.row * layout.width + place.width
            tokens = valid = None
            if place.position in (0, layout.pipeline - 1):
                indices = dealt.of_stream(stream)
                tokens, valid = batch.tokens[indices], batch.valid[indices]
            requests.append(StepRequest(
                step=batch.step, apply=apply, microbatches=dealt.microbatches,
                sizes=dealt.sizes(stream), divisors=batch.divisors, tokens=tokens, valid=valid,
                keep_spans=keep_spans))
        return requests


def programs_for(pipeline: int, microbatches: int, *, training: bool) -> tuple[Program, ...]:
    """Checked programs, one per position. Raises ScheduleError."""
    generate = dualpipe.dualpipe if training else forward_only.forward_only
    schedule = generate(pipeline, microbatches)
    programs = lower(schedule)
    check(schedule, programs)
    return programs
