"""The arrows between the folders, and the purity of `orchestrator`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USES_RAY = {"hosts/coordinator.py", "hosts/stage_actor.py", "data/feed.py", "hosts/cluster.py", "hosts/ray_ranks.py"}
FOR_ALL = {"orchestrator.refusal", "orchestrator.topology", "actors.errors", "actors.tiles"}
MOST_LINES = 400
MAY_IMPORT = re.compile(r"^May import: (.*)\.$", re.MULTILINE)
IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "ray", "numpy", "pyarrow"}:
            raise ImportError(f"{name} has no place here")

sys.meta_path.insert(0, Blocker())
import orchestrator
def fail(name):
    raise
for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator.", onerror=fail):
    importlib.import_module(module.name)
    print(module.name)
"""


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module.split(".")[0])
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_orchestrator_runs_without_torch_ray_numpy_and_pyarrow():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    modules = (path.relative_to(ROOT).with_suffix("").parts for path in files("orchestrator"))
    expected = {".".join(parts).removesuffix(".__init__") for parts in modules}
    assert set(done.stdout.split()) | {"orchestrator"} == expected


@pytest.mark.parametrize("path", files("orchestrator") + files("actors"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    folder, names = path.relative_to(ROOT).parts[0], imported(path)
    if folder == "orchestrator":
        assert not names & {"actors", "jobs", "tests", "torch", "ray", "numpy", "pyarrow", "time"}
    else:
        assert not names & {"jobs", "tests"}
        assert "ray" not in names or path.relative_to(ROOT / "actors").as_posix() in USES_RAY


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(path).removesuffix(".__init__"): path for path in files("orchestrator") + files("actors")}
ROOMS = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def room_of(module: str) -> str:
    return module if module in ROOMS else module.rpartition(".")[0]


def allowed(room: str) -> set[str]:
    """The rooms that this one says it may import."""
    said = MAY_IMPORT.findall(ast.get_docstring(ast.parse(MODULES[room].read_text(encoding="utf-8"))))
    assert len(said) == 1, f"{room} does not say which rooms it may import"
    return set() if said[0] == "no other room" else {f"{room.split('.')[0]}.{name}" for name in said[0].split(", ")}


def rooms_used(path: Path) -> set[str]:
    """Rooms of the same side that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {both if (both := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
        else:
            continue
        found |= {room_of(name) for name in names if name in MODULES and name not in FOR_ALL}
    side = path.relative_to(ROOT).parts[0]
    return {room for room in found if room.split(".")[0] == side}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_what_it_says(room):
    used = set().union(*(rooms_used(path) for module, path in MODULES.items() if room_of(module) == room and module not in FOR_ALL))
    assert used - {room} == allowed(room)


def test_no_room_comes_back_to_itself():
    left = {room: allowed(room) for room in ROOMS}
    while ends := {room for room, others in left.items() if not others & left.keys()}:
        left = {room: others for room, others in left.items() if room not in ends}
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in files("orchestrator") + files("actors") + files("jobs")}))
def test_a_room_can_be_seen_at_once(folder):
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 15, f"{folder} has {len(modules)} modules"


@pytest.mark.parametrize("folder", ["orchestrator", "actors", "jobs", "tests"])
def test_a_file_can_be_read_at_a_sitting(folder):
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_the_document_has_every_room_as_it_describes_itself():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([a-z_/]+)/` \| (.*) \|$", text, re.MULTILINE))
    for path in [*files("orchestrator"), *files("actors"), ROOT / "jobs" / "__init__.py", ROOT / "jobs" / "driver" / "__init__.py"]:
        if path.name == "__init__.py":
            first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n\n")[0].replace("\n", " ")
            assert told.pop(path.parent.relative_to(ROOT).as_posix(), None) == first
    assert sorted(told) == ["dashboards", "jobs/benches", "tests"]


@pytest.mark.parametrize("document", sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")}), ids=lambda path: path.name)
def test_what_documents_link_to_is_there(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target
