"""What a rank makes of the request of one step: microbatches to fill, links to its neighbours; and what it tells of them after."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch

from actors.calls.messages import LossDivisors, LossSums, StepRequest
from actors.comm.groups import Group
from actors.comm.links import Links
from actors.model.chunk import Chunk, LossScales, Microbatch
from orchestrator.config.run_config import RunConfig
from orchestrator.data.ledger import combine, sequence_digest
from orchestrator.layout.layout import Layout

Key = tuple[int, int]
"""(slot, microbatch)."""


def microbatches(request: StepRequest, chunks: Mapping[int, Chunk], layout: Layout, config: RunConfig, device: torch.device, *,
                 keep: bool) -> dict[Key, Microbatch]:
    """By (slot, microbatch). The slots that one microbatch passes share its tokens. keep: what a backward needs."""
    tokens = valid = None
    if request.tokens is not None:
        tokens, valid = (torch.from_numpy(rows).to(device, torch.int64) for rows in (request.tokens, request.valid))
    entrances, starts, at = layout.folding.entrances, {}, 0
    for (slot, microbatch), count in request.sizes.items():
        if slot in entrances:
            starts[slot, microbatch] = at
            at += count
    found = {}
    for (slot, microbatch), count in request.sizes.items():
        start = starts[slot if slot in entrances else entrances[0], microbatch]
        mine = real = None
        if chunks[slot].first or chunks[slot].last:
            mine, real = tokens[start : start + count], valid[start : start + count]
        found[slot, microbatch] = Microbatch(sequences=count, length=config.data.sequence_length, tokens=mine, valid=real,
                                             keep=keep)
    return found


def links(request: StepRequest, line: Group, config: RunConfig, dtype: torch.dtype, device: torch.device) -> Links:
    """To the neighbours in `line`. Messages are [sequences, tokens, channels]; of an empty microbatch there is none."""
    length, width = config.data.sequence_length, config.model.hidden_size

    def shape_of(slot: int, microbatch: int) -> tuple[int, ...] | None:
        count = request.sizes[slot, microbatch]
        return (count, length, width) if count else None

    return Links(line, dtype, device, shape_of)


def scales(config: RunConfig, divisors: LossDivisors) -> LossScales:
    """What the losses of a microbatch count in those of the step."""
    training = config.training
    return LossScales(next_token=1 / divisors.next_token, mtp=training.mtp_loss_weight / divisors.mtp,
                      balance=training.balance_loss_weight / divisors.sequences)


def loss_sums(tapes: Mapping[Key, Microbatch]) -> LossSums:
    return sum((LossSums(float(tape.loss_sum), float(tape.mtp_loss_sum), float(tape.balance_loss_sum), int(tape.correct),
                         int(tape.accepted)) for tape in tapes.values()), LossSums())


def digests(tapes: Mapping[Key, Microbatch], chunks: Mapping[int, Chunk]) -> tuple[int, int]:
    """Of the sequences that entered the pipeline here, and of those whose labels were used here, after their backward. Each
    sequence is hashed by one rank at either end."""
    return tuple(combine(sequence_digest(row.tobytes()) for (slot, _), tape in tapes.items()
                         if getattr(chunks[slot], end) and tape.tokens is not None
                         for row in tape.tokens.cpu().numpy().astype(numpy.int32)) for end in ("first", "last"))
