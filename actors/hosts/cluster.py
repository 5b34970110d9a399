"""What Ray knows of the cluster: nodes, what they offer, and what becomes of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.autoscaler.sdk import request_resources
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.calls.rank_calls import News
from actors.errors import named_line
from actors.files import names
from actors.protocol.silence import LOOK_SECONDS, Silence
from orchestrator.config.run_config import RunConfig, TopologySection
from orchestrator.protocol.members import Member
from orchestrator.told.kinds import ControlStoreAway, ControlStoreBack, Event
from orchestrator.topology import Node, selects

logger = logging.getLogger(__name__)

RANK_RESOURCE = "rank"
WATCH_SECONDS = 0.25
AWAY_SECONDS = 10.0
"""How long Ray's control store may not answer until that is told: one on a busy host takes its time."""
_LOOK_SECONDS = 0.05


def nodes(config: RunConfig) -> tuple[Node, ...]:
    """The nodes that Ray has for a run, each with its ranks, by name."""
    return _offered(ray.nodes(), config.topology)


def rank_kind(resources: Iterable[Mapping[str, float]], wanted: str = "auto") -> str:
    """What a rank takes of a node, the same on all of them: what is wanted; or a GPU if any node has one, else a unit of the
    resource `rank` if any node offers it, else a CPU (which Ray is not asked for: reading data needs CPUs too)."""
    if wanted != "auto":
        return wanted
    offered = list(resources)
    return next((kind for kind in ("GPU", RANK_RESOURCE) if any(node.get(kind) for node in offered)), "CPU")


def settled(config: RunConfig) -> RunConfig:
    """What a rank takes, as it is now: a node of another kind that joins or leaves in mid-run must not change it for all."""
    topology = config.topology
    if topology.virtual_nodes or topology.resource != "auto":
        return config
    kind = rank_kind(node["Resources"] for node in _usable(ray.nodes(), topology))
    return config.model_copy(update={"topology": topology.model_copy(update={"resource": kind})})


def actor_options(config: RunConfig, node: str | None) -> dict[str, Any]:
    """For Ray, of a rank on a node: what it takes, and that it is to be there and nowhere else. None: anywhere."""
    if config.topology.virtual_nodes:
        return {}
    kind = rank_kind((found["Resources"] for found in _usable(ray.nodes(), config.topology)), config.topology.resource)
    claim = {"GPU": {"num_gpus": 1}, "CPU": {}}.get(kind, {"resources": {kind: 1}})
    if node is None:
        return claim | {"label_selector": config.topology.labels}
    return claim | {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def named_actors(run: str) -> tuple[dict[int, Any], dict[Member, Any]]:
    """Actors of a run that Ray counts as alive: coordinators by epoch, ranks by member. Raises RayError: Ray does not answer."""
    coordinators, ranks = {}, {}
    for found in list_named_actors(all_namespaces=True):
        what = names.meaning(found["name"], run) if found["namespace"] == names.NAMESPACE else None
        if what is None:
            continue
        try:
            actor = ray.get_actor(found["name"], names.NAMESPACE)
        except ValueError:  # it has ended meanwhile
            continue
        (ranks if isinstance(what, Member) else coordinators)[what] = actor
    return coordinators, ranks


def end_actors(run: str, seconds: float) -> bool:
    """End all actors of a run. Whether, within so many seconds, there are none any more. Raises RayError."""
    deadline = time.monotonic() + seconds
    while True:
        coordinators, ranks = named_actors(run)  # each time: one may have been on its way
        for actor in (*coordinators.values(), *ranks.values()):
            ray.kill(actor)
        if not coordinators and not ranks:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)


def outliving(name: str) -> dict[str, Any]:
    """For Ray, of an actor that is to be found by its name, and does not end with whoever makes it."""
    return {"name": name, "namespace": names.NAMESPACE, "lifetime": "detached"}


def many_hosts(config: RunConfig) -> bool:
    """Whether ranks may be on other hosts than this one."""
    return not config.topology.virtual_nodes and sum(node["Alive"] for node in ray.nodes()) > 1


def beside_the_driver() -> dict[str, Any]:
    """For Ray, of an actor that is to be on this process's node: the run cannot outlive that one anyway."""
    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def _usable(table: Iterable[Mapping[str, Any]], topology: TopologySection) -> list[Mapping[str, Any]]:
    """Nodes that live and have the labels that are asked for."""
    return [node for node in table if node["Alive"] and selects(topology.labels, node.get("Labels") or {})]


def _offered(table: Iterable[Mapping[str, Any]], topology: TopologySection) -> tuple[Node, ...]:
    usable = {node["NodeID"]: node["Resources"] for node in _usable(table, topology)}
    kind = rank_kind(usable.values(), topology.resource)
    found = [Node(name, _ranks(offered.get(kind, 0), kind, topology.ranks_per_node)) for name, offered in usable.items()]
    return tuple(sorted((node for node in found if node.ranks), key=lambda node: node.name))


def _ranks(offered: float, kind: str, wanted: int | str) -> int:
    """What a node offers. A number from the configuration caps it, and takes the place of a number of CPUs."""
    if wanted == "auto":
        return int(offered)
    return min(int(wanted), int(offered)) if kind != "CPU" or not offered else int(wanted)


def wanted_bundles(config: RunConfig, table: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
    """What an autoscaler is to provide: `elastic.max_nodes` nodes, or `min_nodes` where there is no limit, with as many ranks as the
    largest has at present, or as are configured. Nothing where ranks are not a resource of Ray's, or nobody tells how large nodes are."""
    table = _usable(table, config.topology)
    kind = rank_kind((node["Resources"] for node in table), config.topology.resource)
    elastic, per_node = config.elastic, config.topology.ranks_per_node
    present = _offered(table, config.topology)
    ranks = max((node.ranks for node in present), default=0 if per_node == "auto" else per_node)
    count = elastic.min_nodes if elastic.max_nodes == "auto" else elastic.max_nodes
    return [{kind: ranks}] * count if ranks and kind != "CPU" and (count > 1 or not present) else []


def ask_for_nodes(config: RunConfig) -> None:
    """Tell an autoscaler what is wanted. Without one, nothing comes of it."""
    if wanted := wanted_bundles(config, ray.nodes()):
        labels = config.topology.labels
        request_resources(bundles=wanted, **({"bundle_label_selectors": [labels] * len(wanted)} if labels else {}))


def ask_for_no_more(config: RunConfig) -> None:
    """Take back what `ask_for_nodes` asked for, which an autoscaler would provide for ever. Ray keeps one request for the whole
    cluster."""
    if wanted_bundles(config, ray.nodes()):
        request_resources(bundles=[])


class NodeWatch:
    """Asks Ray a few times a second who is there and who drains, on a thread of its own: that may take as long as it takes. An
    autoscaler, if there is one, is told first how many nodes are wanted.

    told: of events in which Ray's control store has a part; on a thread of this watch.
    """

    def __init__(self, config: RunConfig, told: Callable[[Event], None] = lambda event: None):
        self._config, self._lock, self._news = config, threading.Lock(), []
        self._told: Callable[[News], None] | None = None
        self._known: dict[str, Node] = {}
        self._draining: dict[str, int] = {}
        self._closed, self._tell, self._unanswered = threading.Event(), told, Silence()
        if not config.topology.virtual_nodes:
            for name, watch in (("nodes", self._watch), ("store", self._watch_store)):
                threading.Thread(target=watch, name=name, daemon=True).start()

    def listen(self, told: Callable[[News], None]) -> None:
        """From now on news is told, on this watch's thread, and not kept for `news`; what was kept is told first."""
        with self._lock:
            self._told, kept, self._news = told, self._news, []
        for news in kept:
            told(news)

    def news(self) -> list[News]:
        """Since the last call."""
        with self._lock:
            found, self._news = self._news, []
        return found

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        asked = False
        while not self._closed.wait(WATCH_SECONDS):
            try:
                if not asked:
                    ask_for_nodes(self._config)
                    asked = True
                self._look()
            except Exception as error:  # mostly the control store is away, which ranks do not need; and nobody else looks for nodes
                logger.warning("cannot ask Ray for its nodes: %s", named_line(error))

    def _look(self) -> None:
        table, draining = ray.nodes(), dict(state.get_draining_nodes())
        self._unanswered.broken()
        found = self._compared({node.name: node for node in _offered(table, self._config.topology)}, draining)
        with self._lock:
            told = self._told
            if told is None:
                self._news += found
        for news in found if told is not None else ():
            told(news)

    def _watch_store(self) -> None:
        """Who asks it waits, and cannot tell."""
        since = None
        while not self._closed.wait(LOOK_SECONDS):
            silent = self._unanswered.look()
            if since is None and silent > AWAY_SECONDS:
                since = time.monotonic() - silent
                self._tell(ControlStoreAway(round(silent, 3)))
            elif since is not None and silent < AWAY_SECONDS:
                self._tell(ControlStoreBack(round(time.monotonic() - silent - since, 3)))
                since = None

    def _compared(self, present: dict[str, Node], draining: Mapping[str, int]) -> list[News]:
        found = [News("joined", node) for name, node in present.items() if self._known.get(name) != node]
        found += [News("left", node, "Ray counts it as dead") for name, node in self._known.items() if name not in present]
        for name in present:
            deadline = draining.get(name)
            if deadline is not None and deadline != self._draining.get(name):
                at = time.monotonic() + deadline / 1000 - time.time() if deadline else None
                found.append(News("draining", present[name], "Ray drains it", at))
            if deadline is None and name in self._draining:
                found.append(News("stays", present[name]))
        self._known = present
        self._draining = {name: deadline for name, deadline in draining.items() if name in present}
        return found
