"""Steps of the overlap bench in figures: times, predictions, exposed communication, bytes; and the bars. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.benches.overlap.cluster import ClusterShape, ClusterStep, TokenPayload
from jobs.benches.overlap.figures import steady
from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.spans import Figures, Span, figures
from orchestrator.schedule.timing.durations import Durations, at, per_chunk
from orchestrator.schedule.timing.simulate import Timeline, simulate

EXPOSED, FASTER, PREDICTED = 0.033, 1.5, 0.03
_HEADERS, _MESSAGE_BYTES = 1.12, 600
"""What the kernel may count at most: a multiple of the rows, for headers; and for each message of the transport, which announces
it, acknowledges it, and has counts and routing weights besides."""
OURS, OFF, PEER = ("dualpipe", "searched"), "overlap off", "ScheduleDualPipeV"


@dataclass(frozen=True)
class OverlapCase:
    """schedule: None: torch's own. durations: of a whole position; as measured alone."""

    schedule: Schedule | None
    durations: Durations
    communicates: bool = True
    overlap: bool = True

    @property
    def predicted(self) -> Timeline | None:
        """A simulation with the durations measured alone; without overlap, communication is part of what it stops."""
        if self.schedule is None:
            return None
        durations, stages = self.durations, self.schedule.stages
        if not self.overlap:
            sent = at(durations.dispatch, 0) + at(durations.combine, 0)
            durations = replace(durations, dispatch=0.0, combine=0.0, forward=durations.forward + sent,
                                backward_input=durations.backward_input + sent)
        return simulate(self.schedule, per_chunk(durations, stages))


def expected_bytes(shape: ClusterShape, payload: TokenPayload, layers: int, *, peer: bool) -> int:
    """Of rows that leave a rank's interface in a step in which it communicates for `layers` layers in all.

    A token goes once to each of the other nodes, in each of a layer's four exchanges; of the peer's, once to each of their ranks.
    Without the routing weights beside a dispatched row.
    """
    copies = (shape.nodes - 1) * (shape.width if peer else 1)
    return 4 * layers * copies * payload.count * payload.hidden * 4


def compare(contestants: Mapping[str, OverlapCase], steps: Mapping[str, Sequence[ClusterStep]], wanted: Mapping[str, int],
            members: int) -> dict[str, Any]:
    """members: of an EP group. wanted: bytes of rows that every interface sends in a step, by contestant; the figures of those
    left out are not checked."""
    found: dict[str, Any] = {"contestants": {}}
    for name, measured in steps.items():
        seconds = [step.seconds for step in measured]
        entry: dict[str, Any] = {"seconds": seconds, "median": statistics.median(seconds),
                                 "min": min(seconds), "max": max(seconds),
                                 "latest_start_seconds": max(rank.late for step in measured for rank in step.steps)}
        predicted = contestants[name].predicted
        if predicted is not None:
            entry |= {"placement": contestants[name].schedule.stages.placement, "predicted": predicted.makespan,
                      "measured/predicted": entry["median"] / predicted.makespan}
        entry |= {"exposed": _exposed(measured, predicted), "bytes": _bytes(measured, wanted.get(name), members),
                  "exchanges_of_a_rank": measured[0].steps[0].exchanges}
        found["contestants"][name] = entry
    medians = {name: entry["median"] for name, entry in found["contestants"].items()}
    best = min((name for name in OURS if name in medians), key=medians.__getitem__, default=None)
    found["ratio"] = {f"{other}/{best}": medians[other] / medians[best] for other in (OFF, PEER) if other in medians}
    if "dualpipe" in medians:
        found["ratio"]["dualpipe/searched"] = medians["dualpipe"] / medians["searched"]
    return found


def _exposed(measured: Sequence[ClusterStep], predicted: Timeline | None) -> dict[str, Any]:
    """Means over ranks and repeats. Shares of pairs are of all the steady ones' time together."""
    whole = [rank.shares.step.exposed_communication_seconds for step in measured for rank in step.steps]
    sent = [rank.shares.step.communication_seconds for step in measured for rank in step.steps]
    found: dict[str, Any] = {"step_seconds": statistics.mean(whole), "communication_seconds": statistics.mean(sent)}
    pairs = [rank.shares for step in measured for rank in step.steps if rank.shares.pairs is not None]
    if pairs:
        lengths = [_length(shares.pairs) for shares in pairs]
        found |= {"pairs": sum(shares.pairs.exposed_communication_seconds for shares in pairs) / sum(lengths),
                  "pairs_idle": sum(shares.pairs.bubble_ratio * length for shares, length in zip(pairs, lengths)) / sum(lengths),
                  "pair_seconds": statistics.mean(shares.pair_seconds for shares in pairs)}
    if predicted is not None:
        found["predicted_step_seconds"] = statistics.mean(f.exposed_communication_seconds for f in predicted.figures())
        found["predicted_pairs"] = _predicted_pairs(predicted)
    return found


def _predicted_pairs(predicted: Timeline) -> float:
    """The share of its steady pairs that a simulation exposes."""
    exposed = length = 0.0
    for position, row in enumerate(predicted.graph.schedule.rows):
        for pair in filter(steady, row):
            template = predicted.durations.template(pair, position)
            spans = [Span(position, lane, "", start, end) for lane, start, end in template.spans]
            exposed += figures(spans, 0.0, template.duration).exposed_communication_seconds
            length += template.duration
    return exposed / length if length else 0.0


def _length(figures: Figures) -> float:
    """Of the window: what is not idle is compute or exposed."""
    return (figures.compute_seconds + figures.exposed_communication_seconds) / (1 - figures.bubble_ratio)


def _bytes(measured: Sequence[ClusterStep], wanted: int | None, members: int) -> dict[str, Any]:
    """members: of an EP group; an exchange has a message for each, or fewer."""
    messages = measured[0].steps[0].exchanges * members
    sent = [bytes_ for step in measured for bytes_ in step.sent]
    received = [bytes_ for step in measured for bytes_ in step.received]
    found = {"sent": [min(sent), max(sent)], "received": [min(received), max(received)]}
    if wanted is None:
        return found
    most = _HEADERS * wanted + _MESSAGE_BYTES * (messages + 32)
    return found | {"rows": wanted, "as_expected": all(wanted <= bytes_ <= most for bytes_ in sent + received)}


def verdicts(name: str, found: Mapping[str, Any]) -> dict[str, bool]:
    """The bars, by what they ask."""
    entries, ratio = found["contestants"], found["ratio"]
    checks = {f"{name}: {which} sends the rows of its tokens, and little else": entry["bytes"]["as_expected"]
              for which, entry in entries.items()}
    checks |= {f"{name}: {which} exposes at most {EXPOSED} of its steady pairs": entries[which]["exposed"]["pairs"] <= EXPOSED
               for which in OURS if "pairs" in entries[which]["exposed"]}
    checks |= {f"{name}: {other} takes {FASTER} times as long as our best": value >= FASTER
               for pair, value in ratio.items() if (other := pair.partition("/")[0]) in (OFF, PEER)}
    checks |= {f"{name}: {which} is predicted within {PREDICTED}": abs(entries[which]["measured/predicted"] - 1) <= PREDICTED
               for which in entries if "predicted" in entries[which]}
    checks[f"{name}: searched is faster than dualpipe"] = ratio["dualpipe/searched"] > 1
    return checks
