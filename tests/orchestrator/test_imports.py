"""The arrows between the folders, and the purity of `orchestrator`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USES_RAY = {"coordinator.py", "stage_actor.py", "feed.py", "cluster.py", "ray_ranks.py"}
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
