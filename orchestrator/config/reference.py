"""Every key of the configuration in words: its type, default, unit and meaning, as they are declared where the key is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo

from orchestrator.config.run_config import RunConfig
from orchestrator.config.section import Section, Unit
from orchestrator.refusal import ConfigError, allowed

_NEAR = 4


@dataclass(frozen=True)
class Key:
    """`default`: as it would stand in YAML's JSON form; nothing where `required`. `unit`: empty where there is none."""

    name: str
    type: str
    default: Any
    required: bool
    unit: str
    meaning: str


@dataclass(frozen=True)
class Keys:
    """Those of one section, without the ones of the sections inside it. `name`: dotted."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def sections(root: type[Section] = RunConfig) -> tuple[Keys, ...]:
    """All of them, each followed by those inside it, in the order of declaration."""
    return tuple(found for name, field in root.model_fields.items() for found in _sections(name, field))


def look_up(name: str) -> tuple[Keys, ...]:
    """The key of this name, alone in its section, or the whole of a section and those inside it.

    A key that may hold a section, or null, comes with that section. Raises ConfigError: neither, with what is spelled alike.
    """
    everything = sections()
    found = [Keys(section.name, section.meaning, (key,)) for section in everything for key in section.keys if key.name == name]
    found += [section for section in everything if section.name == name or section.name.startswith(f"{name}.")]
    if not found:
        raise ConfigError("KEY", name, f"no key or section; {_alike(name, everything)}")
    return tuple(found)


def units(annotation: Any) -> set[str]:
    """Names of the units that a type mentions, wherever in it."""
    if isinstance(annotation, Unit):
        return {annotation.name}
    inner = [*get_args(annotation), *getattr(annotation, "__metadata__", ())]
    return set().union(*map(units, inner))


def _sections(name: str, field: FieldInfo) -> Iterator[Keys]:
    inside = section_of(field)
    plain = inspect.cleandoc(inside.__doc__ or "")
    own = f"{_sentence(field.description)} {plain}" if field.description and not _is_key(field) else plain
    yield Keys(name, own, tuple(_key(f"{name}.{key}", entry) for key, entry in inside.model_fields.items() if _is_key(entry)))
    for key, entry in inside.model_fields.items():
        if section_of(entry):
            yield from _sections(f"{name}.{key}", entry)


def section_of(field: FieldInfo) -> type[Section] | None:
    """What a field holds, if that is a section, or a section or null."""
    options = get_args(field.annotation) or (field.annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _is_key(field: FieldInfo) -> bool:
    """A section that is always there is none: its keys are."""
    return section_of(field) is not field.annotation


def _key(name: str, field: FieldInfo) -> Key:
    required = field.is_required()
    found = units(field.annotation) | set().union(*map(units, field.metadata))
    default = None if required else field.get_default(call_default_factory=True)
    return Key(name, allowed(field), default, required, ", ".join(sorted(found)), field.description or "")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _alike(name: str, everything: tuple[Keys, ...]) -> str:
    """Names that may have been meant: the same last word first, then what is spelled alike."""
    names = [key.name for section in everything for key in section.keys] + [section.name for section in everything]
    last = [full for full in names if full.rpartition(".")[2] == name.rpartition(".")[2]]
    words = {full.rpartition(".")[2]: full for full in reversed(names)}
    near = get_close_matches(name, names, _NEAR, 0.75) + [words[word] for word in get_close_matches(name, words, _NEAR, 0.75)]
    if found := list(dict.fromkeys(last + near))[:_NEAR]:
        return f"near it: {', '.join(found)}"
    return f"sections: {', '.join(section.name for section in everything)}"
