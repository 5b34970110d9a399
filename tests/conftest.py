from __future__ import annotations

import os
import shutil
import tempfile

import pytest


@pytest.fixture(scope="session")
def ray_local():
    """A small Ray of this test session's own, whatever else runs on the machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    folder = tempfile.mkdtemp(prefix="dualray-")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=folder,
             log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
