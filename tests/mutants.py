"""Which small changes to the code the tests do not notice.

    python -m tests.mutants orchestrator/told --tests tests/orchestrator/told --seconds 120 --seed 0

Each mutant is one change to one module: a comparison, `and`, `+` or `min` turned round, True for False, an integer one larger, None
returned, a call that is a statement left out, or an assignment to what an object keeps. Mutants are drawn in an order that only the
seed decides, until the time is up. Each is written to a copy of the tree, where the tests run in a process of their own until the
first one fails: nothing in the checkout is ever changed. A mutant is killed if a test fails or nothing ends in time; else it is
printed, as `file:line  old -> new`. One that means the same as before is among those: somebody has to read them.

Left alone: annotations, and decorators, of which `slots=True` and the like mean nothing to a test.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_SWAPPED: dict[type, type] = {}
for _one, _other in ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn),
                     (ast.And, ast.Or), (ast.Add, ast.Sub)):
    _SWAPPED |= {_one: _other, _other: _one}
_NAMES = {"min": "max", "max": "min"}
_SHOWN = (ast.expr, ast.keyword, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
_LONGEST = 110
"""Characters of what is shown."""
_LEAST_SECONDS, _TIMES = 10.0, 4.0
"""A mutant hangs after so long, and so many times what the tests take without one."""
_MOST_BYTES = 8 << 30
"""Of memory: a loop without an end may fill a list."""
_LEFT_OUT = (".*", "__pycache__", "runs", "*.egg-info", "build", "dist")
_PROFILE = "mutation_profile"
_PROFILE_SOURCE = """from hypothesis import Phase, settings
settings.register_profile("mutants", deadline=None, database=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
"""
"""The same examples for each mutant, and none is made smaller: that one fails is all that is asked."""


class TestsFail(RuntimeError):
    """They do without a mutant, or nothing is tested."""

    __test__ = False


@dataclass(frozen=True)
class Mutant:
    """A change to the module at `path`. node, change: which node of its tree, and which of the changes to that."""

    path: str
    line: int
    old: str
    new: str
    node: int
    change: int

    @property
    def room(self) -> str:
        """The folder of the module."""
        return str(Path(self.path).parent)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.old} -> {self.new}"


# --- changes -------------------------------------------------------------------------------------------------------------


def mutants(path: str, source: str) -> list[Mutant]:
    """All of a module, from top to bottom."""
    tree, found = ast.parse(source), []
    for number, (node, parent) in enumerate(_nodes(tree)):
        for which, (field, value) in enumerate(_changes(node, parent)):
            shown = parent if isinstance(parent, _SHOWN) and len(ast.unparse(parent)) <= _LONGEST else node
            before, old = getattr(node, field), _one_line(shown)
            setattr(node, field, value)
            found.append(Mutant(path, node.lineno, old, _one_line(shown), number, which))
            setattr(node, field, before)
    return sorted(found, key=lambda mutant: (mutant.line, mutant.node, mutant.change))


def mutated(source: str, mutant: Mutant) -> str:
    """The module with that change; comments are gone."""
    tree = ast.parse(source)
    node, parent = next(found for number, found in enumerate(_nodes(tree)) if number == mutant.node)
    setattr(node, *_changes(node, parent)[mutant.change])
    return ast.unparse(tree)


def _changes(node: ast.AST, parent: ast.AST | None) -> list[tuple[str, object]]:
    """(field of the node, what it becomes)."""
    match node:
        case ast.Compare(ops=ops):
            return [("ops", [*ops[:at], _SWAPPED[type(op)](), *ops[at + 1:]]) for at, op in enumerate(ops)]
        case ast.BoolOp(op=op) | ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPPED:
            return [("op", _SWAPPED[type(op)]())]
        case ast.Name(id="min" | "max" as name, ctx=ast.Load()):
            return [("id", _NAMES[name])]
        case ast.Constant(value=bool() as value):
            return [("value", not value)]
        case ast.Constant(value=int() as value):
            return [("value", value + 1)]
        case ast.Expr(value=ast.Call()):
            return [("value", ast.Constant(...))]
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            return [("value", ast.Constant(None))]
        case ast.Assign(targets=[target]) if _is_kept(target) and getattr(parent, "name", "") != "__init__":
            return [("value", target)]  # where there is nothing yet, everybody would notice
    return []


def _is_kept(target: ast.expr) -> bool:
    return all(map(_is_kept, target.elts)) if isinstance(target, ast.Tuple) else isinstance(target, ast.Attribute)


def _nodes(node: ast.AST, parent: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Every node that may be changed, with the one around it."""
    yield node, parent
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _nodes(child, node)


def _one_line(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


# --- trials --------------------------------------------------------------------------------------------------------------


class Trial:
    """A copy of the tree at `root`, and the tests that run there. `seconds`: what they take without a mutant.

    Raises TestsFail: they do not pass as it is.
    """

    def __init__(self, root: Path, tests: Sequence[str], folder: Path):
        self._tests, self._folder = tests, folder / "tree"
        shutil.copytree(root, self._folder, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
        (self._folder / f"{_PROFILE}.py").write_text(_PROFILE_SOURCE)
        began = time.monotonic()
        status, output = self._run(None)
        self.seconds = time.monotonic() - began
        if status:
            raise TestsFail(f"the tests do not pass as it is (pytest: {status})\n{output}")

    def kills(self, mutant: Mutant) -> bool:
        """Whether a test fails with it, or hangs."""
        place = self._folder / mutant.path
        source = place.read_text(encoding="utf-8")
        Path(importlib.util.cache_from_source(str(place))).unlink(missing_ok=True)  # of the first run; none is written in this one
        place.write_text(mutated(source, mutant), encoding="utf-8")
        try:
            return self._run(max(_LEAST_SECONDS, _TIMES * self.seconds))[0] != 0
        finally:
            place.write_text(source, encoding="utf-8")

    def _run(self, bound: float | None) -> tuple[int | None, str]:
        """pytest's exit status, None where it took too long, and the end of what it said."""
        environment = os.environ | {"PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "" if bound is None else "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-m", "not long", "-p", "no:cacheprovider",
                   "-p", _PROFILE, "--hypothesis-profile", "mutants", *self._tests]
        process = subprocess.Popen(command, cwd=self._folder, env=environment, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_little_memory)
        try:
            output, _ = process.communicate(timeout=bound)
            return process.returncode, output[-2000:]
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever its tests have started
            process.wait()


def _little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))


# --- the command ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """made: mutants that were tried."""

    made: tuple[Mutant, ...]
    survivors: tuple[Mutant, ...]

    def lines(self) -> list[str]:
        """killed / made by room, then who survived, in the order of the files."""
        made, left = (Counter(mutant.room for mutant in some) for some in (self.made, self.survivors))
        rooms = [f"{room}: killed {made[room] - left[room]} of {made[room]}" for room in sorted(made)]
        return rooms + [str(mutant) for mutant in sorted(self.survivors, key=lambda one: (one.path, one.line, one.node))]


def drawn(root: Path, paths: Iterable[str], seed: int, only: Collection[str] = ()) -> list[Mutant]:
    """Mutants of modules and of all modules of folders, shuffled. only: those that are printed so."""
    files = sorted({file for path in paths for file in ([root / path] if path.endswith(".py") else (root / path).rglob("*.py"))})
    found = [mutant for file in files for mutant in mutants(str(file.relative_to(root)), file.read_text(encoding="utf-8"))]
    random.Random(seed).shuffle(found)
    return [mutant for mutant in found if str(mutant) in only] if only else found


def tried(root: Path, candidates: Iterable[Mutant], tests: Sequence[str], seconds: float) -> Result:
    """One after the other for so long. Raises TestsFail: the tests do not pass as it is."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trial, made, survivors = Trial(root, tests, Path(folder)), [], []
        until = time.monotonic() + seconds
        for mutant in candidates:
            if time.monotonic() >= until:
                break
            made.append(mutant)
            if not trial.kills(mutant):
                survivors.append(mutant)
                print(f"survived: {mutant}", file=sys.stderr, flush=True)
    return Result(tuple(made), tuple(survivors))


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nobody survived, 1: somebody did, 2: there is nothing to say."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Small changes that the tests do not notice.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="modules, or folders of them, from the root of the repository")
    parser.add_argument("--tests", nargs="+", required=True, metavar="PATH", help="what ought to notice; the quickest first")
    parser.add_argument("--seconds", type=float, default=300.0, help="for how long mutants are tried (300)")
    parser.add_argument("--seed", type=int, default=0, help="decides the order in which they are (0)")
    parser.add_argument("--only", type=Path, metavar="FILE", help="what an earlier run printed: its survivors alone are tried")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy goes
    only = options.only.read_text().splitlines() if options.only else ()
    try:
        result = tried(REPOSITORY, drawn(REPOSITORY, options.paths, options.seed, only), options.tests, options.seconds)
    except TestsFail as failure:
        print(failure, file=sys.stderr)
        return 2
    print("\n".join(result.lines()))
    return 1 if result.survivors else 0 if result.made else 2


if __name__ == "__main__":
    sys.exit(main())
