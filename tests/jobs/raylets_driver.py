"""A driver on the head of a RayletCluster: an actor with a heartbeat on every other node, and what is seen of them, in lines of
JSON.

Times are time.monotonic() of the whole machine. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.protocol.heartbeat_client import HeartbeatClient
from actors.protocol.heartbeat_server import HeartbeatServer
from orchestrator.protocol.members import Member

BEAT = 0.1
LOOK = 0.05


@ray.remote(num_cpus=0, resources={"rank": 1})
class Holder:
    def __init__(self, address: tuple[str, int], node: str):
        self._line = HeartbeatClient(address, Member(node, 0), lambda generation: None, BEAT)

    def about(self) -> tuple[int, float]:
        """Its process, and how many `rank`s are left on its node's raylet when asked for one."""
        return os.getpid(), ray.get_runtime_context().get_assigned_resources()["rank"]


def main() -> None:
    ray.init(log_to_driver=False, logging_level="ERROR")
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if "rank" in node["Resources"]}
    told = threading.Event()
    with HeartbeatServer(ray.util.get_node_ip_address(), told=told.set) as server:
        holders = {address: Holder.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            server.address, address) for address, node in nodes.items()}
        about = {address: ray.get(holder.about.remote(), timeout=60) for address, holder in holders.items()}
        while len(server.beats()) < len(holders):
            told.wait(1.0)
            told.clear()
        print(json.dumps({"about": about, "ranks": {address: node["Resources"]["rank"] for address, node in nodes.items()}}),
              flush=True)
        seen = {}
        while not ended.wait(LOOK):
            gone = {member.node: [when, how] for member, when, how in server.ended()}
            seen |= {member: beat.at for member, beat in server.beats().items()}
            alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
            heard = {member.node: when for member, when in seen.items()}
            print(json.dumps({"now": time.monotonic(), "alive": alive, "heard": heard, "ended": gone}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
