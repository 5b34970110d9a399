"""One class name for one idea, over the whole tree."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAY_RECUR = {"Settings": "what every bench calls the settings that it takes; jobs/bench.py looks for it by this name"}


def class_names(text: str) -> list[str]:
    """Of those at the top level of a module, private ones too, in order; also where that depends on a condition."""
    found, left = [], list(ast.parse(text).body)
    while left:
        node = left.pop(0)
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            left = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)] + left
    return found


def defined() -> dict[str, list[str]]:
    """Files by the names of their classes."""
    found = defaultdict(list)
    for folder in ("orchestrator", "actors", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in class_names(path.read_text(encoding="utf-8")):
                found[name].append(path.relative_to(ROOT).as_posix())
    return found


def test_classes_are_found_wherever_a_module_defines_them():
    text = "class A:\n    class Inner: pass\ndef f():\n    class Local: pass\nif True:\n    class B: pass\nelse:\n    class _C(A): pass\n"
    assert class_names(text) == ["A", "B", "_C"]


def test_a_class_name_stands_for_one_thing():
    assert {name: paths for name, paths in defined().items() if len(paths) > 1 and name not in MAY_RECUR} == {}


def test_what_may_recur_does():
    assert [name for name in MAY_RECUR if len(defined()[name]) < 2] == []
