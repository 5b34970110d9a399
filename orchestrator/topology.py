"""Nodes and the ranks they offer. Crossing a node is slow; inside one, links are fast."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One host. `ranks`: accelerators it offers (one StageActor each)."""

    name: str
    ranks: int


def virtual_nodes(count: int, ranks_per_node: int) -> tuple[Node, ...]:
    """Divide one machine into `count` nodes, so that everything about nodes can be developed on it."""
    return tuple(Node(f"virtual-{n}", ranks_per_node) for n in range(count))


_NAME = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_SELECTOR = re.compile(rf"(?P<other>!?)(?:in\((?P<several>{_NAME}(?:, *{_NAME})*)\)|(?P<one>{_NAME}))")
"""Of a label's value, in Ray's own form: value, !value, in(value, ...), !in(value, ...)."""


def is_label(text: str) -> bool:
    return _LABEL.fullmatch(text) is not None


def is_selector(text: str) -> bool:
    return _SELECTOR.fullmatch(text) is not None


def selects(selectors: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is meant: each selector holds. A node without a label has none of its values.

    Args: selectors: by label; each such that `is_selector`.
    """
    return all(_holds(_SELECTOR.fullmatch(text), labels.get(label)) for label, text in selectors.items())


def _holds(selector: re.Match[str], value: str | None) -> bool:
    values = [selector["one"]] if selector["one"] else re.split(", *", selector["several"])
    return (value in values) != bool(selector["other"])
