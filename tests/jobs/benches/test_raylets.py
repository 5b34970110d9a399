"""What happens to hosts, seen by Ray and over heartbeats; process trees; nothing is left behind. Needs root, like namespaces."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.benches.shared import networks
from jobs.benches.shared.raylets import RayletCluster, freeze_tree, kill_tree, thaw_tree, tree
from tests.cluster import eventually

DRIVER = "tests.jobs.raylets_driver"
BEAT = 0.1
RAY_SECONDS = 20.0  # its checks take about 2 s; the cores are shared


@pytest.fixture(scope="module")
def cluster():
    with RayletCluster(3, 2) as found:
        yield found
    assert not any(os.path.exists(f"/var/run/netns/{name}") for name in found.network.namespaces)
    assert not os.path.exists(found.folder)


class Looks:
    """What the driver sees."""

    def __init__(self, process):
        self.ended, self._lines = {}, queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(process.stdout,))
        self._reader.start()

    def _read(self, stream):
        for line in stream:
            if line.startswith('{"'):  # Ray says things too, when a node is lost
                self._lines.put(json.loads(line))

    def next(self):
        look = self._lines.get(timeout=60)
        self.ended |= look.get("ended", {})
        return look

    def close(self):
        self._reader.join(20)

    def until(self, condition, seconds=RAY_SECONDS):
        """The first look of which `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition(look := self.next()):
            assert time.monotonic() < deadline, look
        return look


@pytest.fixture(scope="module")
def driver(cluster):
    process = cluster.start("-m", DRIVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    looks = Looks(process)
    looks.about = looks.next()
    yield looks
    process.stdin.close()
    process.wait(20)
    looks.close()
    process.stdout.close()


def test_every_node_has_its_raylet_its_address_and_its_ranks(cluster, driver):
    assert driver.about["ranks"] == {address: 2.0 for address in cluster.addresses[1:]}
    assert all(driver.about["about"][cluster.addresses[node]][0] in cluster.pids(node) for node in cluster.nodes)
    assert set(driver.next()["alive"]) == set(cluster.addresses)


def test_a_killed_node_is_noticed_at_once_by_its_heartbeat_connection_and_later_by_ray(cluster, driver):
    address, before = cluster.addresses[1], time.monotonic()
    cluster.kill(1)
    driver.until(lambda look: address in driver.ended)
    when, how = driver.ended[address]
    assert when - before < 0.5 and how in ("EOF", "reset") and not cluster.pids(1)
    look = driver.until(lambda look: address not in look["alive"])
    print(f"killed: heartbeat {when - before:.3f} s, Ray {look['now'] - before:.2f} s")


@pytest.mark.parametrize("node, happen, over", [(2, "cut", "restore"), (3, "freeze", "thaw")])
def test_of_a_node_that_is_cut_off_or_frozen_there_is_silence(cluster, driver, node, happen, over):
    address, before = cluster.addresses[node], time.monotonic()
    getattr(cluster, happen)(node)
    look = driver.until(lambda look: look["now"] - look["heard"][address] > 5 * BEAT)
    silent = look["now"]
    assert address not in driver.ended
    look = driver.until(lambda look: address not in look["alive"])
    print(f"{happen}: silence of {5 * BEAT} s after {silent - before:.2f} s, Ray {look['now'] - before:.2f} s")
    getattr(cluster, over)(node)  # of which Ray lets the raylet end, now that it counts as lost, and the actor with it
    driver.until(lambda look: address in driver.ended, 60)


def test_a_node_that_was_lost_comes_back_at_its_address(cluster, driver):
    cluster.kill(1)
    cluster.add(1)
    driver.until(lambda look: cluster.addresses[1] in look["alive"])


FAMILY = """
import subprocess, sys
depth = int(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]]) if depth else None
print(depth, flush=True)
while True:
    sum(range(1000))
"""


@pytest.fixture
def family():
    """A process that computes, as its child does, and its grandchild."""
    process = subprocess.Popen([sys.executable, "-c", FAMILY, "2", FAMILY], stdout=subprocess.PIPE, text=True)
    assert {process.stdout.readline() for _ in range(3)} == {"0\n", "1\n", "2\n"}
    yield process
    kill_tree(process.pid)
    process.wait()
    process.stdout.close()


def ticks(pid):
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def states(pids):
    return [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids]


def test_a_tree_is_frozen_and_thawed(family):
    found = tree(family.pid)
    assert len(found) == 3 and found[0] == family.pid and os.getpid() not in found
    assert freeze_tree(family.pid) == found
    eventually(lambda: set(states(found)) == {"T"}, 5, "all are stopped")
    before = [ticks(pid) for pid in found]
    thaw_tree(family.pid)
    eventually(lambda: all(ticks(pid) > was for pid, was in zip(found, before)), 20, "all compute again")


def test_a_tree_is_killed(family):
    found = tree(family.pid)
    kill_tree(family.pid)
    family.wait(10)
    eventually(lambda: not any(tree(pid) for pid in found), 10, "all are gone")
    assert tree(family.pid) == []


OWNER = """
from jobs.benches.shared.raylets import RayletCluster
cluster = RayletCluster(0, 1)
print(cluster.folder, *cluster.network.namespaces, flush=True)
input()
"""


def test_when_its_owner_is_killed_all_of_a_cluster_ends():
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        try:
            folder, namespace = owner.stdout.readline().split()
            assert networks.pids(namespace)
        finally:
            owner.kill()
    eventually(lambda: not networks.pids(namespace) and not os.path.exists(folder), 20, "all ends")
    networks.remove_stale()
    assert not os.path.exists(f"/var/run/netns/{namespace}")
