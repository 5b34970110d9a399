"""One Ray cluster for the whole session; commands connect to it as a user's would, in-process tests through `ray_local`."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from tests.cluster import start_cluster

settings.register_profile("dualray", deadline=None)  # how long an example takes is not what it tests, and hosts are busy
settings.load_profile("dualray")


@pytest.fixture(scope="session")
def cluster():
    found, stop = start_cluster()
    yield found
    stop()


@pytest.fixture(scope="session")
def ray_local(cluster):
    """Ray connected in this process."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
