"""The Ray actor of a rank: thin. Compute calls run in one thread, control calls and waiting for files in others, so that a
rank whose compute is blocked in communication still answers and can be aborted."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray

from actors.calls.messages import StepReport
from actors.calls.rank_calls import Reply
from actors.errors import named_line
from actors.files import names
from actors.files.run_folder import reads
from actors.hosts.auth_token import wanted_token
from actors.hosts.cluster import actor_options, many_hosts, outliving
from actors.protocol.silence import LOOK_SECONDS, Silence
from actors.runtime.call_server import CallServer
from actors.runtime.rank import Rank
from actors.telemetry.exporter import Exporter, RankMetrics, listening, reachable
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.events import CallId, Fault
from orchestrator.protocol.members import Member

logger = logging.getLogger(__name__)

FIRST_SECONDS = 300.0
"""How long a rank waits at least for its first coordinator: that may be starting."""


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"compute": 1, "control": 4, "files": 1})
class StageActor:
    """One rank. It outlives its coordinator, and ends by itself when for `elastic.orphan_seconds` no other one came."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._host = ray.util.get_node_ip_address()
        self._listen = listening(config.telemetry.host, self._host, many_hosts(config))[:1]
        self._rank = Rank(config, self._host)
        self._server = CallServer(self._rank)
        self._metrics = RankMetrics()
        self._exporter = Exporter(self._metrics.registry, self._listen, 0, token=wanted_token())
        self._attaching, self._attached = threading.Lock(), ()
        threading.Thread(target=self._end_alone, name="alone", daemon=True).start()

    def _end_alone(self) -> None:
        """End this process when it has no coordinator for too long: nobody would ever end it."""
        silence, most = Silence(), max(FIRST_SECONDS, self._config.elastic.orphan_seconds)
        while silence.look() <= most:
            if self._rank.connected:
                silence.broken()
                most = self._config.elastic.orphan_seconds
            time.sleep(LOOK_SECONDS)
        logger.warning("no coordinator for %g s: this rank ends", most)
        os._exit(0)  # whatever its threads are doing

    @ray.method(concurrency_group="control")
    def configuration(self) -> RunConfig:
        """What it was created with."""
        return self._config

    @ray.method(concurrency_group="control")
    def reads(self, path: str, token: str) -> bool:
        """Whether this node sees the run folder: a token that was written there."""
        return reads(path, token)

    @ray.method(concurrency_group="control")
    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str, epoch: int = 0) -> None:
        """Does nothing where that was done: only the answer was lost. Raises RuntimeError, whatever it was: not every error can be sent.
        The traceback stays in this actor's log."""
        target, wanted = f"{reachable(self._listen[0], self._host)}:{self._exporter.port}", (member, address, beat_seconds, run, epoch)
        with self._attaching:
            if wanted == self._attached:
                return
            try:
                self._rank.attach(member, address, beat_seconds, run, target, epoch)
            except Exception as error:
                logger.exception("not attached")
                raise RuntimeError(named_line(error)) from None
            self._attached = wanted

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        self._rank.abort()

    # calls of the control protocol, one method for each lane

    @ray.method(concurrency_group="compute")
    def compute(self, call: CallId, generation: int, method: str, arguments: tuple) -> Reply | Fault:
        answer = self._server.serve(call, generation, method, arguments)
        if isinstance(answer, Reply) and isinstance(answer.value, StepReport):
            self._metrics.observe(answer.value)
        return answer

    @ray.method(concurrency_group="control")
    def control(self, call: CallId, generation: int, method: str, arguments: tuple) -> Reply | Fault:
        return self._server.serve(call, generation, method, arguments)

    @ray.method(concurrency_group="files")
    def files(self, call: CallId, generation: int, method: str, arguments: tuple) -> Reply | Fault:
        return self._server.serve(call, generation, method, arguments)


def create(config: RunConfig, member: Member, run: str = "", anywhere: bool = False) -> Any:
    """A StageActor on its member's node, or wherever there is room. run: as whose it is found by name, and outlives whoever
    creates it; none: it does not. Raises ValueError: it is there already; RayError: Ray does not answer."""
    options = actor_options(config, None if anywhere else member.node) | (outliving(names.of_rank(run, member)) if run else {})
    return StageActor.options(**options).remote(config)
