"""Links that are slow in truth: network namespaces on a bridge, each of their interfaces shaped in both directions.

A node is a namespace with one or more interfaces, like a host with a network card for every accelerator. An interface is one
end of a pair; the other is a port of the bridge. Both ends send through a token bucket (tc-tbf(8)), so a node can neither
send nor receive faster than its rate. What two processes of one node exchange stays in the node and is not slowed down.
Needs root and Linux. Addresses of neighbours are permanent, so that nothing but the ranks' own bytes is ever counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_CLONE_NEWNET = 0x40000000  # setns(2)
_NAMESPACES = Path("/var/run/netns")
_DEVICES = Path("/sys/class/net")
_MTU = 1500  # larger packets save the kernel work, but messages of a few kilobytes then travel in lumps
_BURST_BYTES = 2 * (_MTU + 14)  # a bucket takes one whole packet at least; a full one lets little through at once
_BURST_SECONDS = 2e-4  # but as much as comes until the kernel's timer looks again, or fast links stay far below their rate
_QUEUE_BYTES = 32 << 20  # of a bucket: what ranks have under way fits, so nothing is dropped and sent again
_SETTLED = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}
"""The same on every host, whatever its own are: on one with bbr, steps of 16 ranks took 2 to 7 % longer."""
_TIMEOUT_SECONDS = 30.0
_NAME = re.compile(r"dr([0-9a-f]+)[g-z](?:b|n\d+|\d+-\d+)")  # the process, one of its networks, what it is of that
_letters = itertools.cycle("ghijklmnopqrstuvwxyz")  # no hexadecimal digits


class NetworkRefused(RuntimeError):
    """This machine does not give us a network. `str()` is one line."""


@dataclass(frozen=True, slots=True)
class Interface:
    """Number `index` of node `node`. `port`: its other end, at the bridge, in the namespace of whoever made the network."""

    node: int
    index: int
    namespace: str
    device: str
    port: str
    address: str
    hardware_address: str


@dataclass(frozen=True, slots=True)
class InterfaceTraffic:
    """Bytes that a node has sent and received through one interface, headers included, as the kernel counts them."""

    sent: int
    received: int

    def since(self, earlier: InterfaceTraffic) -> InterfaceTraffic:
        return InterfaceTraffic(self.sent - earlier.sent, self.received - earlier.received)


class Network:
    """`nodes` namespaces with `interfaces` each, of `megabits` a second in each direction; a context manager.

    `host`: the address at which processes outside of the namespaces are reached from inside.
    Raises NetworkRefused: no root, no `ip` or `tc`, or the kernel says no. What was made until then is removed.
    """

    def __init__(self, nodes: int, megabits: float, interfaces: int = 1):
        if os.geteuid() != 0:
            raise NetworkRefused("network namespaces need root")
        remove_stale()
        self._name = f"dr{os.getpid():x}{next(_letters)}"
        subnet = _free_subnet()
        self._bridge, self.host = f"{self._name}b", f"{subnet}.254"
        self.namespaces = tuple(f"{self._name}n{node}" for node in range(nodes))
        self.interfaces = tuple(self._interface(subnet, node, index, interfaces)
                                for node in range(nodes) for index in range(interfaces))
        try:
            self._make(subnet, megabits)
        except BaseException:
            self.close()
            raise

    def interface(self, node: int, index: int = 0) -> Interface:
        return next(found for found in self.interfaces if (found.node, found.index) == (node, index))

    def set_rate(self, interface: Interface, megabits: float) -> None:
        """Of both directions."""
        for options, device in ((["-n", interface.namespace], interface.device), ([], interface.port)):
            _run(["tc", *options, *_bucket("replace", device, megabits)])

    def cut(self, interface: Interface) -> None:
        """Nothing passes any more, and nobody is told."""
        _run(["ip", "link", "set", interface.port, "down"])

    def restore(self, interface: Interface) -> None:
        _run(["ip", "link", "set", interface.port, "up"])

    def traffic(self) -> dict[tuple[int, int], InterfaceTraffic]:
        """Of every interface, by (node, index), since it was made. A port receives what its node sends."""
        return {(found.node, found.index): InterfaceTraffic(_count(found.port, "rx_bytes"), _count(found.port, "tx_bytes"))
                for found in self.interfaces}

    def close(self) -> None:
        """Remove everything. Processes inside keep their namespace, without interfaces, until they end."""
        _remove(self.namespaces, [*(found.port for found in self.interfaces), self._bridge])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _interface(self, subnet: str, node: int, index: int, interfaces: int) -> Interface:
        number = node * interfaces + index + 1
        return Interface(node, index, self.namespaces[node], f"eth{index}", f"{self._name}{node}-{index}",
                         f"{subnet}.{number}", f"02:44:52:00:00:{number:02x}")

    def _make(self, subnet: str, megabits: float) -> None:
        """Raises NetworkRefused."""
        own = "02:44:52:00:00:fe"
        _batch(["ip"], [
            f"link add {self._bridge} address {own} type bridge", f"link set {self._bridge} addrgenmode none",
            f"addr add {self.host}/24 dev {self._bridge}", f"link set {self._bridge} up",
            *(f"netns add {name}" for name in self.namespaces)])
        _batch(["ip"], itertools.chain.from_iterable((
            (f"link add {x.port} mtu {_MTU} type veth peer name {x.device} address {x.hardware_address} mtu {_MTU} "
             f"netns {x.namespace}"),
            f"link set {x.port} addrgenmode none", f"link set {x.port} master {self._bridge} up",
            f"neigh replace {x.address} lladdr {x.hardware_address} dev {self._bridge} nud permanent") for x in self.interfaces))
        for node, name in enumerate(self.namespaces):
            mine = [x for x in self.interfaces if x.node == node]
            _batch(["ip", "-n", name], ["link set lo up", *itertools.chain.from_iterable(
                self._inside(x, own) for x in mine)])
            _batch(["tc", "-n", name], [" ".join(_bucket("add", x.device, megabits)) for x in mine])
            _run(["ip", "netns", "exec", name, "sh", "-ec",
                  "; ".join(f"echo {value} > /proc/sys/net/ipv4/{key}" for key, value in _SETTLED.items())])
        _batch(["tc"], [" ".join(_bucket("add", x.port, megabits)) for x in self.interfaces])

    def _inside(self, mine: Interface, host_hardware: str) -> list[str]:
        """What is said in a namespace of one of its interfaces: what goes to interfaces of its number leaves through it.

        By destination, since gloo does not bind the sockets that it connects. The way to the host is the first interface's.
        """
        rail = [(x.address, x.hardware_address) for x in self.interfaces if x.node != mine.node and x.index == mine.index]
        if mine.index == 0:
            rail.append((self.host, host_hardware))
        return [f"link set {mine.device} addrgenmode none", f"addr add {mine.address}/32 dev {mine.device}",
                f"link set {mine.device} up",
                *(f"neigh replace {address} lladdr {hardware} dev {mine.device} nud permanent" for address, hardware in rail),
                *(f"route add {address}/32 dev {mine.device} src {mine.address}" for address, _ in rail)]


def enter(namespace: str) -> None:
    """Move this thread, and those that it starts from now on, to a namespace. Sockets that are open stay where they are.

    Raises OSError: there is no such namespace, or no right to enter it.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    handle = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(handle, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(handle)


def pids(namespace: str) -> list[int]:
    """Processes inside; none where there is no such namespace."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS,
                          check=False)
    return [int(word) for word in done.stdout.split()]


def remove_stale() -> None:
    """Remove what a process made that is gone, and end what still runs inside."""
    names = [*(os.listdir(_NAMESPACES) if _NAMESPACES.is_dir() else ()), *os.listdir(_DEVICES)]
    gone = [name for name in names if (found := _NAME.fullmatch(name)) and not os.path.exists(f"/proc/{int(found[1], 16)}")]
    namespaces = [name for name in gone if (_NAMESPACES / name).exists()]
    for pid in [pid for name in namespaces for pid in pids(name)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _remove(namespaces, [name for name in gone if (_DEVICES / name).exists()])


def _remove(namespaces: Sequence[str], devices: Iterable[str]) -> None:
    """Those that exist. A pair goes with the namespace of one of its ends, but later, so ends are removed first."""
    for device in devices:
        if (_DEVICES / device).exists():
            subprocess.run(["ip", "link", "del", device], capture_output=True, timeout=_TIMEOUT_SECONDS, check=False)
    for namespace in namespaces:
        if (_NAMESPACES / namespace).exists():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=_TIMEOUT_SECONDS, check=False)


def _bucket(verb: str, device: str, megabits: float) -> list[str]:
    burst = max(_BURST_BYTES, round(megabits * 1e6 / 8 * _BURST_SECONDS))
    return ["qdisc", verb, "dev", device, "root", "tbf", "rate", f"{round(megabits * 1e6)}bit", "burst", str(burst),
            "limit", str(_QUEUE_BYTES)]


def _free_subnet() -> str:
    """The first three numbers of an address of which no interface here has any."""
    text = _run(["ip", "-j", "-4", "addr"])
    used = {address["local"].rpartition(".")[0] for device in json.loads(text) for address in device.get("addr_info", ())}
    start = os.getpid()
    for number in range(start, start + 25600):
        if (subnet := f"10.{100 + number // 256 % 100}.{number % 256}") not in used:
            return subnet
    raise NetworkRefused("no free network address")


def _count(device: str, name: str) -> int:
    return int((_DEVICES / device / "statistics" / name).read_text())


def _batch(command: Sequence[str], lines: Iterable[str]) -> None:
    _run([*command, "-batch", "-"], "\n".join(lines) + "\n")


def _run(command: Sequence[str], text: str | None = None) -> str:
    """Standard output. Raises NetworkRefused."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise NetworkRefused(f"there is no command {command[0]} (Debian: iproute2)") from None
    if done.returncode:
        first = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise NetworkRefused(f"{' '.join(command)}: {first}")
    return done.stdout
