"""What a user reads when a setting is refused: one line with the key, the value and what is allowed.

What is allowed is worded from the declaration of the field, so it is the same whichever way a value fails, and is never
pydantic's own wording ("input should be a valid integer or input should be 'auto'").
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_LONGEST = 120  # characters of a value that are shown
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))
_UNKNOWN = ("extra_forbidden", "invalid_key")
_COUNTS = {2: "two"}


@dataclass(frozen=True)
class Spelled:
    """How text is spelled, beside its type, where its pattern does not say it to a person."""

    words: str


class ConfigError(ValueError):
    """A refused setting. `str()` is the one line a user sees."""

    def __init__(self, key: str, value: Any, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{_shown(key)} = {_shown(value)}: {_on_one_line(allowed)}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, Any, str]]:
        return type(self), (self.key, self.value, self.allowed)  # an exception is pickled by its text alone, for which this takes more


def _on_one_line(text: str) -> str:
    """What is allowed may quote what was given."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def refusal(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """The one complaint to show about `tree`, which is no `root`. An unknown key goes first: it is what the user typed,
    where the misspelt name is also missing."""
    errors = error.errors(include_url=False)
    found = next((e for e in errors if e["type"] in _UNKNOWN), errors[0])
    section, keys, value, field = root, [], tree, None
    for part in found["loc"]:
        if section is None:  # inside a list, or the branch of a union that was tried
            break
        keys.append(str(part))
        value = value.get(part)
        field = section.model_fields.get(part)
        if field is None:
            return ConfigError(".".join(keys), value, f"unknown key; allowed here: {', '.join(section.model_fields)}")
        section = _section(field.annotation)
    if field is None:
        return ConfigError("configuration", value, f"a mapping of sections: {', '.join(root.model_fields)}")
    absent = found["type"] == "missing" and len(keys) == len(found["loc"])
    return ConfigError(".".join(keys), value, f"must be given: {allowed(field)}" if absent else allowed(field))


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words."""
    if spelled := next((entry.words for entry in field.metadata if isinstance(entry, Spelled)), None):
        return f"text of {spelled}"
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [bound for entry in arguments[1:] for bound in getattr(entry, "metadata", [entry])])
    if origin in (Union, UnionType):
        last = [option for option in arguments if _section(option)]  # its keys are a long list
        return " or ".join(_words(option, metadata) for option in [o for o in arguments if o not in last] + last)
    if origin is Literal:
        options = [option if isinstance(option, str) else json.dumps(option) for option in arguments]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin is dict:
        return "a mapping of {}s to {}s".format(*map(_words, arguments)).replace("texts", "text")
    if origin in (list, tuple):
        count = f"{_COUNTS[len(arguments)]} " if origin is tuple else ""
        item, *bounds = _words(arguments[0]).removeprefix("an ").split(" ", 1)
        return " ".join([f"a list of {count}{item}s", *bounds])
    if _section(annotation):
        return f"a section with keys {', '.join(annotation.model_fields)}"
    name = {int: "an integer", float: "a finite number", str: "text", bool: "true or false", NoneType: "null"}[annotation]
    bounds = [f"{words} {getattr(entry, key)}" for entry in metadata for key, words in _BOUNDS if hasattr(entry, key)]
    return f"{name} ({', '.join(bounds)})" if bounds and annotation in (int, float) else name


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null; None for a plain value."""
    options = get_args(annotation) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _shown(value: Any) -> str:
    """On one line, cut where it is long."""
    if isinstance(value, str) and value.isprintable() and value:
        text = value
    else:
        try:
            text = json.dumps(value, default=str)
        except (ValueError, RecursionError):
            text = "(a value that holds itself)"  # YAML's `&a [*a]`
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
