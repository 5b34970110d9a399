"""dashboards/build.py as a module: `dashboards` is a folder of files for others, not a package."""

from __future__ import annotations

import importlib.util
import sys

from tests.cluster import REPOSITORY

_spec = importlib.util.spec_from_file_location("dualray_dashboards", REPOSITORY / "dashboards" / "build.py")
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)
