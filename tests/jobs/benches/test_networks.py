"""Links of a rate, seen by processes on both sides; everything gone afterwards. Needs root, like what it tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.benches.shared import networks
from jobs.benches.shared.networks import InterfaceTraffic, Network, NetworkRefused, enter

MEGABITS = 40.0
BYTES = 1_000_000
PORT = 5000


def sink(namespace: str, address: str, told) -> None:
    """Take one connection in `namespace`, answer the first byte, read to the end; tell how many bytes, and when."""
    enter(namespace)
    with socket.create_server((address, PORT)) as server:
        told.send("listening")
        peer, _ = server.accept()
        with peer:
            peer.sendall(peer.recv(1))
            count = 0
            while data := peer.recv(1 << 16):
                count += len(data)
            told.send((count, time.perf_counter()))


def source(namespace: str, address: str, count: int, told) -> None:
    """Send `count` bytes to `address`; tell when the first left, or what went wrong."""
    enter(namespace)
    try:
        with socket.create_connection((address, PORT), timeout=2.0) as peer:
            peer.sendall(b"?")
            peer.recv(1)
            started = time.perf_counter()
            peer.sendall(bytes(count))
    except OSError as error:
        told.send(type(error).__name__)
        return
    told.send(started)


def start(target, *arguments):
    """A process, and the end of a pipe that it tells things to."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, its), daemon=True)
    process.start()
    its.close()
    return process, mine


def told(pipe):
    assert pipe.poll(30), "nothing was told in time"
    return pipe.recv()


def transfer(network: Network, sender, receiver, count: int = BYTES) -> float | str:
    """Seconds that `count` bytes take from one interface's node to another interface; or what the sender met with."""
    sinking, heard = start(sink, receiver.namespace, receiver.address)
    try:
        assert told(heard) == "listening"
        sending, said = start(source, sender.namespace, receiver.address, count)
        started = told(said)
        sending.join(10)
        if isinstance(started, str):
            return started
        arrived, at = told(heard)
        assert arrived == count
        return at - started
    finally:
        sinking.kill()
        sinking.join()


@pytest.fixture(scope="module")
def network():
    with Network(2, MEGABITS, interfaces=2) as made:
        yield made


def seconds(count: int, megabits: float) -> float:
    return count * 8 / (megabits * 1e6)


@pytest.mark.parametrize("sender, receiver", [((0, 0), (1, 0)), ((1, 1), (0, 1)), ((0, 1), (1, 0))])
def test_a_transfer_takes_its_bytes_at_the_rate(network, sender, receiver):
    taken = transfer(network, network.interface(*sender), network.interface(*receiver))
    assert seconds(BYTES, MEGABITS) <= taken + 0.01 and taken == pytest.approx(seconds(BYTES, MEGABITS), rel=0.15)


def test_each_direction_has_a_rate_and_it_can_be_changed(network):
    """Shaped at both ends: the slower one of sender and receiver decides."""
    slow = network.interface(1, 1)
    network.set_rate(slow, MEGABITS / 4)
    try:
        count = BYTES // 4
        for sender, receiver in ((network.interface(0, 1), slow), (slow, network.interface(0, 1))):
            taken = transfer(network, sender, receiver, count)
            assert taken == pytest.approx(seconds(count, MEGABITS / 4), rel=0.15)
    finally:
        network.set_rate(slow, MEGABITS)


def test_a_fast_link_is_not_far_below_its_rate(network):
    """A bucket that holds a packet or two is refilled by a timer, which lets a gigabit through and no more."""
    fast, megabits, count = [network.interface(0, 0), network.interface(1, 0)], 4000.0, 200_000_000
    for interface in fast:
        network.set_rate(interface, megabits)
    try:
        assert transfer(network, *fast, count) < seconds(count, megabits / 2)
    finally:
        for interface in fast:
            network.set_rate(interface, MEGABITS)


def test_inside_a_node_nothing_is_slowed_down(network):
    assert transfer(network, network.interface(0, 0), network.interface(0, 1)) < seconds(BYTES, MEGABITS) / 4


def test_bytes_are_counted_where_they_pass(network):
    before = network.traffic()
    transfer(network, network.interface(0, 1), network.interface(1, 1))
    passed = {key: after.since(before[key]) for key, after in network.traffic().items()}
    headers = 1.05
    assert BYTES <= passed[0, 1].sent == passed[1, 1].received <= headers * BYTES
    assert passed[0, 1].received == passed[1, 1].sent < 0.05 * BYTES  # acknowledgements
    assert passed[0, 0] == passed[1, 0] == InterfaceTraffic(0, 0)


def test_a_cut_link_lets_nothing_through_until_it_is_restored(network):
    away = network.interface(1, 0)
    network.cut(away)
    try:
        assert transfer(network, network.interface(0, 0), away, 1000) in ("TimeoutError", "OSError")
        assert isinstance(transfer(network, network.interface(0, 1), network.interface(1, 1), 1000), float)
    finally:
        network.restore(away)
    assert isinstance(transfer(network, network.interface(0, 0), away, 1000), float)


def of_prefix(prefix: str) -> list[str]:
    folder = Path("/var/run/netns")
    names = [*(os.listdir(folder) if folder.is_dir() else ()), *os.listdir("/sys/class/net")]
    return [name for name in names if name.startswith(prefix)]


def test_nothing_is_left_and_networks_do_not_meet():
    with Network(2, MEGABITS) as one, Network(3, MEGABITS) as other:
        names = {*one.namespaces, *other.namespaces}
        assert len(names) == 5 and names <= set(os.listdir("/var/run/netns"))
        assert one.host.rpartition(".")[0] != other.host.rpartition(".")[0]
        prefixes = [network.namespaces[0].rpartition("n")[0] for network in (one, other)]
        assert all(of_prefix(prefix) for prefix in prefixes)
    assert not any(of_prefix(prefix) for prefix in prefixes)


def test_what_failed_half_way_is_removed(monkeypatch):
    before = set(os.listdir("/sys/class/net"))
    monkeypatch.setattr(networks, "_bucket", lambda *arguments: ["qdisc", "add", "dev", "nowhere", "root", "tbf"])
    with pytest.raises(NetworkRefused, match="tc"):
        Network(2, MEGABITS)
    assert not of_prefix(f"dr{os.getpid():x}") or set(os.listdir("/sys/class/net")) == before


def test_what_a_dead_process_left_is_removed():
    """A process that ends without cleaning up, then a network of ours."""
    code = ("import os; from jobs.benches.shared.networks import Network; "
            "network = Network(2, 10.0); print(os.getpid(), *network.namespaces, flush=True); os._exit(0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True,
                          timeout=60, check=True)
    pid, *namespaces = done.stdout.split()
    assert all((Path("/var/run/netns") / name).exists() for name in namespaces)
    with Network(2, MEGABITS):
        assert not of_prefix(f"dr{int(pid):x}")


def test_without_root_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkRefused, match="^network namespaces need root$"):
        Network(2, MEGABITS)


def test_no_such_namespace():
    with pytest.raises(OSError, match="dr0xn0"):
        enter("dr0xn0")
