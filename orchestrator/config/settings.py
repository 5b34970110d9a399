"""Settings as people write them: a YAML file, and `dotted.key=value` on top. What they mean is config.py's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from orchestrator.refusal import ConfigError

_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)  # the last two: `!!int x`, brackets a thousand deep


def read_tree(path: str) -> dict[str, Any]:
    """A file's settings as nested dictionaries. Raises ConfigError: the file is missing, not YAML, or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("--config", path, f"a readable YAML file ({reason})") from None
    try:
        tree = yaml.load(text, _StrictLoader)
    except _NO_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise ConfigError("--config", path, f"valid YAML{where}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("--config", path, "a YAML mapping of sections")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last. A date is text: `run.name: 2024-05-01`."""

    yaml_implicit_resolvers = {first: [entry for entry in found if entry[0] != "tag:yaml.org,2002:timestamp"]
                               for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put one `dotted.key=value` into a tree of settings, in place. Raises ConfigError: it is not of that form."""
    key, separator, text = override.partition("=")
    *parents, leaf = key.split(".")
    if not separator or not all([*parents, leaf]):
        raise ConfigError("--set", override, "dotted.key=value")
    try:
        value = yaml.load(text, _StrictLoader)
    except _NO_YAML:
        raise ConfigError(key, text, "a YAML value") from None
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(key, value, f"unknown key: {parent} is not a section")
    tree[leaf] = value
