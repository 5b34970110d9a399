"""What a ledger says of the generations of a run, so that the run can be repeated through the same layouts.

A ledger line that begins a generation, or a placement, carries three records beside the step: `layout` (of `Layout`, all its
fields), `schedule` (the section of the configuration) and `placement` (of every layer at every place that hosts it: replica,
position, layer, experts by index in the EP group). With the configuration these decide everything else: programs, owners of
optimizer shards, process groups. `layers_per_stage`, where it is recorded, goes before the configuration's.
Nothing here is believed unchecked: a ledger that was cut, edited or written by another version is refused, with its line.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import ValidationError

from orchestrator.config.run_config import LayoutSection, RunConfig, ScheduleSection, check
from orchestrator.data.ledger import STEP, Cuts, LedgerEntry, entries
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement, default_placement
from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.stages import Stages

_PINS = ("expert", "data", "shape")


class ReplayRefused(ValueError):
    """This ledger cannot be repeated. `str()` is one line that names the line of the ledger, or the step, and why."""


@dataclass(frozen=True)
class Recorded:
    """From step `first_step` on: one layout, placement and schedule. `config`: the run's, with what this generation changed."""

    first_step: int
    generation: int
    layout: Layout
    placement: Placement
    config: RunConfig

    @property
    def schedule(self) -> ScheduleSection:
        return self.config.schedule


@dataclass(frozen=True)
class Replay:
    """`changes`: by first step, the first of them at step 0. `losses`: of each step, exactly as it was computed."""

    changes: tuple[Recorded, ...]
    losses: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.losses)

    def at(self, step: int) -> Recorded:
        """What step `step` ran with."""
        return self.changes[bisect_right([change.first_step for change in self.changes], step) - 1]

    def begins(self, step: int) -> Recorded | None:
        """What changes before step `step`, if anything does."""
        found = self.at(step)
        return found if found.first_step == step else None


def read(lines: Iterable[str], config: RunConfig) -> Replay:
    """The ledger `lines` of a run of `config`. Raises ReplayRefused: it is not whole, or not that of such a run."""
    changes: list[Recorded] = []
    losses: list[float] = []
    found = list(entries(lines))
    cuts = Cuts(found)
    for entry in found:
        number, line = entry.number, _values(entry)
        if entry.kind != STEP or cuts.voids(entry):
            continue
        if line["step"] != len(losses):
            raise ReplayRefused(f"line {number}: step {line['step']} where step {len(losses)} is due")
        losses.append(float(line["loss"]))
        if "layout" in line:
            changes.append(_recorded(number, line, config))
        elif not changes:
            raise ReplayRefused(f"line {number}: the first step has no layout: this is no beginning of a ledger")
        elif line["generation"] != changes[-1].generation:
            raise ReplayRefused(f"line {number}: generation {line['generation']} begins without its layout")
    if not losses:
        raise ReplayRefused("the ledger has no line")
    return Replay(tuple(changes), tuple(losses))


def layout_of(record: Mapping[str, Any]) -> Layout:
    """The layout of which `record` is `dataclasses.asdict`, by way of JSON; keys that are no field of it are left alone.

    Raises ValueError: a field is missing or of another type, or there is no such layout.
    """
    missing = [field.name for field in fields(Layout) if field.name not in record]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    found = Layout(Stages(**record["folding"]), _integer(record["positions_per_node"]), _integer(record["width"]),
                   tuple(tuple((str(node), _integer(first)) for node, first in row) for row in record["cells"]),
                   tuple(tuple(map(_integer, rows)) for rows in record["replicas"]))
    _check(found)
    return found


def placement_of(record: Iterable[Mapping[str, Any]], config: RunConfig, layout: Layout) -> Placement:
    """The placement of which `record` lists replica, position, layer and experts. Raises ValueError: it is not one of this
    layout, or does not have each expert once in each EP group."""
    expected = default_placement(config.model, layout, config.layout.layers_per_stage)
    experts = {(entry["replica"], entry["position"], entry["layer"]):
               tuple(tuple(map(_integer, held)) for held in entry["experts"]) for entry in record}
    places = {(entry.replica, entry.position, entry.layer) for entry in expected.placed}
    if unknown := experts.keys() - places:
        raise ValueError(f"(replica, position, layer) = {min(unknown)} is no place of the layout")
    if missing := places - experts.keys():
        raise ValueError(f"(replica, position, layer) = {min(missing)} is missing")
    everyone = list(range(config.model.n_routed_experts))
    for key, held in experts.items():
        if sorted(expert for of_rank in held for expert in of_rank) != everyone:
            raise ValueError(f"(replica, position, layer) = {key} does not have each of {len(everyone)} experts once")
        if len(held) != len(layout.expert_group(*key[:2])):
            raise ValueError(f"(replica, position, layer) = {key} has experts of {len(held)} ranks, the layout has "
                             f"{len(layout.expert_group(*key[:2]))}")
    return Placement(tuple(replace(entry, experts=experts[entry.replica, entry.position, entry.layer])
                           for entry in expected.placed))


def _recorded(number: int, line: Mapping[str, Any], config: RunConfig) -> Recorded:
    part = "layout"
    try:
        layout = layout_of(line["layout"])
        part = "schedule"
        config = _configured(line, layout, config)
        part = "placement"
        placement = placement_of(line["placement"], config, layout)
    except KeyError as error:
        raise ReplayRefused(f"line {number}: {part}: no {error.args[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReplayRefused(f"line {number}: {part}{'.' * bool(where)}{where}: {first['msg']}") from None
    except (ConfigError, ValueError, TypeError, AttributeError) as error:
        raise ReplayRefused(f"line {number}: {part}: {error}") from None
    return Recorded(line["step"], line["generation"], layout, placement, config)


def _configured(line: Mapping[str, Any], layout: Layout, config: RunConfig) -> RunConfig:
    """The run's configuration with this generation's schedule, pipeline and stages; other pins are the layout's now."""
    schedule = ScheduleSection.model_validate(line["schedule"])
    tree = config.layout.model_dump() | dict.fromkeys(_PINS, "auto") | {"pipeline": layout.pipeline}
    tree["layers_per_stage"] = line.get("layers_per_stage", tree["layers_per_stage"])
    found = config.model_copy(update={"schedule": schedule, "layout": LayoutSection.model_validate(tree)})
    check(found)
    if found.stages != layout.folding:
        raise ValueError(f"{schedule.kind} folds the stages as {found.stages}, the layout as {layout.folding}")
    return found


def _check(layout: Layout) -> None:
    """Raises ValueError."""
    each = layout.positions_per_node
    if each < 1 or layout.width < 1 or layout.pipeline % each:
        raise ValueError(f"cells of {each} positions x {layout.width} ranks do not make pipelines of {layout.pipeline} positions")
    if not layout.cells or any(len(row) != layout.pipeline // each for row in layout.cells):
        raise ValueError(f"a row that has not {layout.pipeline // each} cells")
    if sorted(row for rows in layout.replicas for row in rows) != list(range(layout.rows)) or not all(layout.replicas):
        raise ValueError(f"replicas {layout.replicas} are not the {layout.rows} rows, each once")
    seats = [(place.node, place.local) for place in layout.places]
    if len(set(seats)) != len(seats) or any(local < 0 for _, local in seats):
        raise ValueError("two ranks have the same place on a node")


def _values(entry: LedgerEntry) -> Mapping[str, Any]:
    """Raises ReplayRefused: they are not those of its kind."""
    line = entry.values
    if entry.damaged is not None and entry.kind and type(line.get("step")) is int:
        raise ReplayRefused(f"line {entry.number}: {entry.damaged}")
    if entry.damaged is not None or entry.kind == STEP and not (
            type(line.get("generation")) is int and isinstance(line.get("loss"), int | float)):
        raise ReplayRefused(f"line {entry.number}: not that of a committed step")
    return line


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} where a whole number belongs")
    return value
