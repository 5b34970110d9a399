"""1F1B with several stages a position, in a loop: a microbatch passes the positions once for each chunk.

Microbatches go in groups: all of a group pass one chunk, then the next chunk, before the next group enters. Position r runs
(v - 1) groups' worth of forwards and 2(P - 1 - r) more, then a forward and a backward in turn, then the backwards left.
interleaved_1f1b          bubble (P - 1)(F + B)/v where M >= P, F and B of a whole position
merged_interleaved_1f1b   one more forward first, so that each forward and the backward after it are of different
                          microbatches and run as a pair
Sources: "Efficient Large-Scale Language Model Training on GPU Clusters" (arXiv 2104.04473), section 2.2; Megatron-Core,
`get_pp_rank_microbatches` and `get_schedule_table`, with `overlap_moe_expert_parallel_comm` for the merged one.
"""

from __future__ import annotations

from itertools import pairwise

from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Row, Work
from orchestrator.schedule.ir.stages import Stages


def interleaved_1f1b(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """With any number of chunks."""
    return tuple(_row(stages, position, microbatches, merged=False) for position in range(stages.positions))


def merged_interleaved_1f1b(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """As `interleaved_1f1b`, in pairs."""
    return tuple(_row(stages, position, microbatches, merged=True) for position in range(stages.positions))


def groups(microbatches: int, positions: int) -> tuple[range, ...]:
    """Groups of P microbatches; if P does not divide M, as many near-equal ones as hold at least P each, larger ones first.

    Never fewer than P where there are more than one: a position would wait for the last one's output, which waits for
    gradients that the first one owes. A later group that is larger would be short of forwards.
    """
    count = max(1, microbatches // positions)
    least, larger = divmod(microbatches, count)
    starts = [least * index + min(index, larger) for index in range(count + 1)]
    return tuple(range(start, end) for start, end in pairwise(starts))


def _row(stages: Stages, position: int, microbatches: int, *, merged: bool) -> Row:
    grouped, stage = groups(microbatches, stages.positions), stages.hosted(position)
    chunks = range(stages.chunks)
    forwards = [Compute(ActionKind.FORWARD, stage[c], c, m) for group in grouped for c in chunks for m in group]
    backwards = [Compute(ActionKind.BACKWARD, stage[c], c, m) for group in grouped for c in reversed(chunks) for m in group]
    ahead = (stages.chunks - 1) * len(grouped[0]) + 2 * (stages.positions - 1 - position) + merged
    row: list[Work] = [*forwards[:ahead]]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        row += [Pair(forward, backward)] if merged else [forward, backward]
    return (*row, *backwards[max(0, len(forwards) - ahead):])
