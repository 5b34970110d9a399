"""Every key says what it means, every number in what unit; both are found by name."""

from __future__ import annotations

import math
from typing import Literal, get_args, get_origin

import pytest
from pydantic import Field

from orchestrator.config.reference import look_up, section_of, sections, units
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.config.section import Number, Section, Steps
from orchestrator.refusal import ConfigError


def holds_a_number(annotation) -> bool:
    """A value of a Literal is a choice, nothing is measured by it."""
    if get_origin(annotation) is Literal:
        return False
    return annotation in (int, float) or any(map(holds_a_number, get_args(annotation)))


def silent(root: type[Section], name: str = "") -> list[str]:
    """What of a configuration does not explain itself: keys without a meaning, sections without a docstring, numbers without
    exactly one unit, units of what is no number."""
    found = [] if name == "" or root.__dict__.get("__doc__") else [name]
    for key, field in root.model_fields.items():
        full, inside = f"{name}.{key}".strip("."), section_of(field)
        of = units(field.annotation) | set().union(*map(units, field.metadata))
        if inside is not None:
            found += silent(inside, full)
        if (inside is None or inside is not field.annotation) and not field.description:
            found.append(full)
        if inside is None and len(of) != holds_a_number(field.annotation):
            found.append(full)
    return found


def test_there_is_no_key_without_a_meaning_and_no_number_without_a_unit():
    assert silent(RunConfig) == []


def test_those_that_would_say_nothing_are_found():
    class Inside(Section):
        said: bool = Field(True, description="something")

    class Outside(Section):
        """Documented."""

        named: Steps = 3
        counted: int = Field(4, description="without a unit")
        fine: Number = Field(1.0, description="a ratio")
        choice: Literal["auto", 1] = Field("auto", description="no number is measured")
        inside: Inside = Inside()

    assert silent(Outside, "outside") == ["outside.named", "outside.counted", "outside.inside"]


def flat(tree: dict, name: str = "") -> dict:
    """Values by dotted name; a mapping of labels is a value."""
    found = {}
    for key, value in tree.items():
        full = f"{name}.{key}".strip(".")
        found |= flat(value, full) if isinstance(value, dict) and full != "topology.labels" else {full: value}
    return found


def test_names_and_defaults_are_those_that_a_run_has():
    told = {key.name: key for section in sections() for key in section.keys}
    assert len(told) == sum(len(section.keys) for section in sections())
    unwritten = ("model.rope_scaling.", "training.batch_ramp.")
    assert {name: key.default for name, key in told.items() if not name.startswith(unwritten)} == flat(RunConfig().model_dump())
    written = parse({}, ["model.rope_scaling={factor: 2.5, original_max_position_embeddings: 7}",
                         "training.batch_ramp={start_sequences: 3, steps: 5}"])
    given = {"model.rope_scaling.factor": 2.5, "model.rope_scaling.original_max_position_embeddings": 7,
             "training.batch_ramp.start_sequences": 3, "training.batch_ramp.steps": 5}
    assert {name for name, key in told.items() if key.required} == set(given)
    assert {name: given.get(name, key.default) for name, key in told.items() if name.startswith(unwritten)} == {
        name: value for name, value in flat(written.model_dump()).items() if name.startswith(unwritten)}


def test_a_key_alone():
    section, = look_up("training.steps")
    key, = section.keys
    assert (section.name, key.name, key.type) == ("training", "training.steps", "an integer (above 0)")
    assert (key.default, key.required) == (100, False)
    assert (key.unit, key.meaning) == ("steps", "optimizer steps of the whole run")


@pytest.mark.parametrize("key, unit", [
    ("elastic.silence_seconds", "seconds"), ("layout.layers_per_stage", "layers"), ("layout.shape", "positions, ranks"),
    ("schedule.costs.hop", "a shared unit of time"), ("optimizer.beta1", ""), ("telemetry.trace_steps", "steps"), ("run.name", "")])
def test_units_wherever_in_a_type(key, unit):
    section, = look_up(key)
    assert [entry.unit for entry in section.keys] == [unit]


def test_all_durations_in_seconds_say_so():
    found = [key for section in sections() for key in section.keys if key.name.endswith("_seconds")]
    assert len(found) >= 10 and {key.unit for key in found} == {"seconds"}


@pytest.mark.parametrize("name, names", [
    ("schedule", ["schedule", "schedule.costs"]), ("schedule.costs", ["schedule.costs"]), ("run", ["run"]),
    ("model.rope_scaling", ["model", "model.rope_scaling"])])
def test_sections(name, names):
    found = look_up(name)
    assert [section.name for section in found] == names and all(section.keys for section in found)
    assert math.prod(key.name.startswith(name) for section in found for key in section.keys)


@pytest.mark.parametrize("name, near", [
    ("training.stpes", "training.steps"), ("stpes", "training.steps"), ("seed", "run.seed"), ("trainig", "training"),
    ("model.seed", "run.seed"), ("optimizer.lerning_rate", "optimizer.learning_rate")])
def test_what_is_spelled_alike(name, near):
    with pytest.raises(ConfigError) as caught:
        look_up(name)
    line = str(caught.value)
    assert line.startswith(f"KEY = {name}: no key or section; near it: ") and near in line.partition("near it: ")[2].split(", ")


def test_where_nothing_is_spelled_alike_the_sections_are_named():
    with pytest.raises(ConfigError) as caught:
        look_up("zzz")
    assert str(caught.value).endswith("; sections: " + ", ".join(section.name for section in sections()))
