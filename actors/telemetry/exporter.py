"""Prometheus exporters: one per rank, and the coordinator's, which also serves the list of targets for `http_sd`."""

from __future__ import annotations

import errno
import hmac
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, disable_created_metrics, make_wsgi_app

from actors.calls.messages import StepReport
from orchestrator.telemetry.goodput import KINDS, RECOVERY
from orchestrator.told import kinds
from orchestrator.told.consumers import Handlers
from orchestrator.told.lines import Told

AUTO, _LOOPBACK = "auto", "127.0.0.1"
PAGE = Path(__file__).parent / "page.html"
_PORTS = (*range(9464, 9474), 0)
"""What dashboards/prometheus.yml asks for targets; beyond ten runs on a host, any."""


class PortInUse(RuntimeError):
    """The exporter's address cannot be bound. `str()` is one line."""


disable_created_metrics()  # a series more for each counter, when it began to count: nobody asks, and ranks would pay

@dataclass(frozen=True, slots=True)
class _Scrapes:
    """Of one client: when it asked last, in seconds of the monotonic clock, and how long after the time before."""

    last: float
    interval: float | None


Route = Callable[[], tuple[str, bytes]]
"""A page: its content type, and its content."""


class Exporter:
    """Serves /metrics, and what `routes` has by path, from threads of its own. port: AUTO takes the first of _PORTS that is free.

    Nothing that is served changes anything. token: what clients must show (`Authorization: Bearer ...` or `?token=...`), if any, but
    for `/`, the page itself, which knows nothing of the run and asks for the token.
    """

    def __init__(self, registry: CollectorRegistry, hosts: Sequence[str], port: int | str, routes: Mapping[str, Route] | None = None,
                 token: str | None = None):
        self._metrics, self._routes, self._token = make_wsgi_app(registry, disable_compression=True), dict(routes or {}), token
        self._scrapes, self._scraped = {}, threading.Condition()
        self._servers = self._bound(hosts, port)
        self.port = self._servers[0].server_port
        for server in self._servers:
            threading.Thread(target=server.serve_forever, name="exporter", daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def last_words(self, seconds: float) -> None:
        """Return once the metrics of this moment have been scraped, at the latest after `seconds`; at once where nobody scrapes
        regularly, or that scrape is overdue."""
        began = time.monotonic()
        with self._scraped:
            for client, scrapes in list(self._scrapes.items()):
                if scrapes.interval is not None and (due := scrapes.last + 2 * scrapes.interval) > began:
                    self._scraped.wait_for(lambda client=client: self._scrapes[client].last > began,
                                           min(began + seconds, due) - time.monotonic())

    def _note_scrape(self, client: str) -> None:
        now = time.monotonic()
        with self._scraped:
            before = self._scrapes.get(client)
            self._scrapes[client] = _Scrapes(now, now - before.last if before else None)
            self._scraped.notify_all()

    def _bound(self, hosts: Sequence[str], port: int | str) -> list[WSGIServer]:
        """A server for each host, all at one port."""
        for candidate in _PORTS if port == AUTO else (port,):
            found: list[WSGIServer] = []
            try:
                for host in hosts:
                    found.append(make_server(host, found[0].server_port if found else candidate, self._answer, _Server, _Quiet))
                return found
            except OSError as error:
                for server in found:
                    server.server_close()
                if error.errno == errno.EADDRINUSE and port == AUTO and candidate:
                    continue
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise PortInUse(f"telemetry.port = {port}: cannot listen on {host} ({error.strerror}); "
                                    "0 takes any free port") from error
                raise PortInUse(f"telemetry.host = {host}: an address of the node that listens ({error.strerror})") from error
        raise AssertionError("the last of _PORTS is any")

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET":
            return _plain(start_response, "405 Method Not Allowed", "nothing here can be changed")
        path = environ["PATH_INFO"]
        route = self._routes.get(path)
        if self._token and not (path == "/" and route) and not self._shown(environ):
            return _plain(start_response, "401 Unauthorized", "Ray's token is wanted: Authorization: Bearer TOKEN, or ?token=TOKEN")
        if path == "/metrics":
            self._note_scrape(environ.get("REMOTE_ADDR", ""))
            return self._metrics(environ, start_response)
        if route is None:
            return _plain(start_response, "404 Not Found", f"there is /metrics{''.join(f', {known}' for known in self._routes)}")
        kind, body = route()
        start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
        return [body]

    def _shown(self, environ: dict[str, Any]) -> bool:
        given = [environ.get("HTTP_AUTHORIZATION", "").removeprefix("Bearer "), *parse_qs(environ.get("QUERY_STRING", "")).get("token", ())]
        return any(hmac.compare_digest(text.encode(), self._token.encode()) for text in given)


def _plain(start_response: Callable[..., Any], status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]


def json_route(values: Callable[[], Any]) -> Route:
    """Numbers that are not finite, which JSON has no word for, become null."""
    return lambda: ("application/json", json.dumps(_finite(values()), allow_nan=False).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class RankMetrics:
    """What one rank exports. Labels are bounded: the rank's place is in the target's labels, not in each series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector("dualray_rank", registry=self.registry)
        if torch.cuda.is_available():
            Gauge("dualray_rank_accelerator_memory_bytes", "Memory of tensors on the accelerator",
                  registry=self.registry).set_function(torch.cuda.memory_allocated)
        self._step = Gauge("dualray_rank_step", "Step that this rank computed last", registry=self.registry)
        self._seconds = Gauge("dualray_rank_step_seconds", "Duration of the last step on this rank", registry=self.registry)
        self._compute = Counter("dualray_rank_compute_seconds", "Time with compute", registry=self.registry)
        self._exposed = Counter("dualray_rank_exposed_communication_seconds", "Time with communication and no compute",
                                registry=self.registry)
        self._overlap = Gauge("dualray_rank_overlap_ratio", "Share of communication hidden by compute, last step",
                              registry=self.registry)
        self._bubble = Gauge("dualray_rank_bubble_ratio", "Share of the last step spent waiting for the pipeline",
                             registry=self.registry)
        self._sent = Counter("dualray_rank_pipeline_sent_bytes", "Bytes sent to pipeline neighbours", registry=self.registry)
        self._across = Counter("dualray_rank_exchange_across_nodes_bytes", "Bytes of dispatch and combine sent to other nodes",
                               registry=self.registry)
        self._inside = Counter("dualray_rank_exchange_inside_node_bytes",
                               "Bytes of dispatch and combine sent to other ranks of the same node", registry=self.registry)

    def observe(self, report: StepReport) -> None:
        self._step.set(report.step)
        self._seconds.set(report.seconds)
        self._compute.inc(report.figures.compute_seconds)
        self._exposed.inc(report.figures.exposed_communication_seconds)
        self._overlap.set(report.figures.overlap_ratio)
        self._bubble.set(report.figures.bubble_ratio)
        self._sent.inc(report.bytes_sent)
        self._across.inc(report.exchanged.across)
        self._inside.inc(report.exchanged.inside)


class RunMetrics:
    """What the coordinator exports: the run as a whole. steps: how many it is to have, after which it only validates and saves;
    save_every: steps between its checkpoints, 0 where only the end has one."""

    _GAUGES = {
        "step": ("dualray_committed_step", "Newest committed step"),
        "loss": ("dualray_loss", "Next-token cross-entropy of the last committed step, nats a token"),
        "tokens_per_second": ("dualray_tokens_per_second", "Tokens a second, last step"),
        "seconds": ("dualray_step_seconds", "Duration of the last step"),
        "overlap_ratio": ("dualray_overlap_ratio", "Share of communication hidden by compute, mean over ranks"),
        "bubble_ratio": ("dualray_bubble_ratio", "Share of the step spent waiting for the pipeline, mean over ranks"),
        "exposed_comm_seconds": ("dualray_exposed_communication_seconds", "Communication with no compute, mean over ranks"),
        "gradient_norm": ("dualray_gradient_norm", "Global gradient norm before clipping"),
        "learning_rate": ("dualray_learning_rate", "Learning rate of the last committed step"),
        "busiest_expert": ("dualray_expert_load_ratio", "Largest expert load divided by the mean, worst layer"),
        "generation": ("dualray_generation", "Generation of the layout"),
        "nodes": ("dualray_nodes", "Nodes in the layout"),
    }

    def __init__(self, steps: int | None = None, save_every: int = 0) -> None:
        self.registry, self._steps = CollectorRegistry(), steps
        Gauge("dualray_checkpoint_every_steps", "Steps between checkpoints; 0: only at the end", registry=self.registry).set(save_every)
        self._gauges = {key: Gauge(name, text, registry=self.registry) for key, (name, text) in self._GAUGES.items()}
        self._tokens = Counter("dualray_tokens", "Tokens of committed steps", registry=self.registry)
        self._across = Counter("dualray_exchange_across_nodes_bytes", "Bytes of dispatch and combine across nodes, all ranks",
                               registry=self.registry)
        self._inside = Counter("dualray_exchange_inside_nodes_bytes", "Bytes of dispatch and combine inside nodes, all ranks",
                               registry=self.registry)
        self._slow = Gauge("dualray_slow_factor", "How much slower a rank or a link is than its like, while it is slow",
                           ("rank", "node", "peer", "lane"), registry=self.registry)
        self._validation = Gauge("dualray_validation_loss", "Newest validation loss, nats a token", registry=self.registry)
        self._checkpoint = Gauge("dualray_checkpoint_timestamp_seconds", "When the newest checkpoint was made, or the run began",
                                 registry=self.registry)
        self._checkpoint.set_to_current_time()
        self._at = Gauge("dualray_committed_step_timestamp_seconds", "When the newest step was committed, or the run began",
                         registry=self.registry)
        self._at.set_to_current_time()
        self._spent = Counter("dualray_spent_seconds", "Wall time by what it went to", ("on",), registry=self.registry)
        self._not_finite = Counter("dualray_not_finite", "Steps whose loss or gradient was not finite; they end a run",
                                   registry=self.registry)
        for kind in KINDS:
            self._spent.labels(kind)
        self._utilisation: Gauge | None = None
        self._ended = Gauge("dualray_ended", "1 once the last step is committed, or the run has ended otherwise, or is being stopped", registry=self.registry)
        self._failures = Counter("dualray_failures", "Times that ranks were lost; all that were lost at once count as one",
                                 registry=self.registry)
        self._lost = Counter("dualray_lost_ranks", "Rank processes that were lost", registry=self.registry)
        self._recoveries = Counter("dualray_recoveries", "Generations after a loss, a drain or a join, with state of memory or loaded",
                                   registry=self.registry)
        self._recovery = Gauge("dualray_recovery_seconds", "From noticing the last change to its new generation",
                               registry=self.registry)
        self._moved = Counter("dualray_moved_state_bytes", "State that moved from rank to rank, all ranks", registry=self.registry)
        self._waiting = Gauge("dualray_waiting_for_nodes", "1 while there are fewer nodes than elastic.min_nodes",
                              registry=self.registry)
        self._checkpointed = Gauge("dualray_checkpoint_step", "Committed steps in the newest checkpoint", registry=self.registry)

    def ended(self) -> None:
        self._ended.set(1)

    def recall(self, events: Iterable[Told]) -> None:
        """Of a run that goes on: what it saved and scored last."""
        newest = {type(told.event): told for told in events if isinstance(told.event, kinds.CheckpointWritten | kinds.Validated)}
        for told in newest.values():
            self._HANDLERS(self, told)

    def observe(self, kind: str, values: Any) -> None:
        """Take what a trainer's `watch` is told."""
        if kind == "step":
            self._observe_step(values)
        elif kind == "event":
            self._HANDLERS(self, values)

    def _observe_step(self, values: dict[str, Any]) -> None:
        for key, gauge in self._gauges.items():
            gauge.set(values[key])
        if values.get("mfu") is not None:
            self._observe_utilisation(values["mfu"])
        self._tokens.inc(values["tokens"])
        self._at.set(values["time"])
        self._waiting.set(0)
        for spent_on, seconds in values["spent"].items():
            self._spent.labels(spent_on).inc(max(0.0, seconds - (values.get("redone", 0.0) if spent_on == RECOVERY else 0.0)))
        if values["step"] + 1 == self._steps:
            self.ended()
        self._across.inc(values["bytes_across_nodes"])
        self._inside.inc(values["bytes_inside_nodes"])

    def _observe_utilisation(self, ratio: float) -> None:
        """A series only where it is known."""
        if self._utilisation is None:
            self._utilisation = Gauge("dualray_model_flops_utilisation_ratio",
                                      "Model FLOPs / what the accelerators can do in dense BF16 products", registry=self.registry)
        self._utilisation.set(ratio)

    # --- events ------------------------------------------------------------------------------------------------------

    def _validated(self, event: kinds.Validated, time: float) -> None:
        self._validation.set(event.loss)

    def _saved(self, event: kinds.CheckpointWritten, time: float) -> None:
        self._checkpoint.set(time)
        self._checkpointed.set(event.step)

    def _placed(self, event: kinds.ExpertsPlaced, time: float) -> None:
        self._slow.clear()  # ranks are watched anew

    def _formed(self, event: kinds.GenerationFormed, time: float) -> None:
        self._stands(event)
        self._recovered(event.seconds)
        self._moved.inc(event.bytes)

    def _loaded(self, event: kinds.GenerationLoaded, time: float) -> None:
        self._stands(event)
        if event.recovery_seconds is not None:
            self._recovered(event.recovery_seconds)

    def _stands(self, event: kinds.GenerationFormed | kinds.GenerationLoaded) -> None:
        self._slow.clear()  # ranks are numbered anew, and watched anew
        self._waiting.set(0)
        self._gauges["nodes"].set(event.nodes)

    def _recovered(self, seconds: float) -> None:
        self._recoveries.inc()
        self._recovery.set(seconds)

    def _ranks_lost(self, event: kinds.RanksLost, time: float) -> None:
        self._lost.inc(len(event.members))
        self._failures.inc()

    def _waits(self, event: kinds.NodesAwaited, time: float) -> None:
        self._waiting.set(1)

    def _went_wrong(self, event: kinds.NotFinite, time: float) -> None:
        self._not_finite.inc()

    def _is_slow(self, event: kinds.Slow, time: float) -> None:
        self._slow.labels(*_slow_labels(event)).set(event.factor)

    def _slow_over(self, event: kinds.SlowOver, time: float) -> None:
        self._slow.remove(*_slow_labels(event))

    _HANDLERS = Handlers({
        kinds.Validated: _validated, kinds.CheckpointWritten: _saved, kinds.ExpertsPlaced: _placed, kinds.GenerationFormed: _formed,
        kinds.GenerationLoaded: _loaded, kinds.RanksLost: _ranks_lost, kinds.NodesAwaited: _waits, kinds.NotFinite: _went_wrong,
        kinds.Slow: _is_slow, kinds.SlowOver: _slow_over,
    }, leaves=(
        kinds.LayoutPlanned, kinds.Resumed, kinds.StartedOver, kinds.Interrupted, kinds.RanksAborted, kinds.CommittedStateLost,
        kinds.CoordinatorRestarted, kinds.NodesJoining, kinds.NodesDraining, kinds.NodeIdle, kinds.NodeBarred, kinds.CheckpointFailed,
        kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway, kinds.DataAway, kinds.ControlStoreAway,
        kinds.ControlStoreBack, kinds.Replayed, kinds.UnknownEvent))


def _slow_labels(event: kinds.Slow | kinds.SlowOver) -> tuple[str, ...]:
    return str(event.rank), event.node, "" if event.peer is None else str(event.peer), event.lane


def listening(host: str, node: str, many_hosts: bool) -> tuple[str, ...]:
    """What exporters of the node `node` bind to, for `telemetry.host`; others reach them at the first. Always also the host itself
    where that was left to us, so that what runs on the head finds the coordinator without knowing its address."""
    if host != AUTO:
        return (host,)
    return (node, _LOOPBACK) if many_hosts and node != _LOOPBACK else (_LOOPBACK,)


def reachable(listen: str, host: str) -> str:
    """The address under which others reach an exporter that listens on `listen` of node `host`."""
    return host if listen in ("0.0.0.0", "::", "") else listen


class _Server(ThreadingMixIn, WSGIServer):
    """Its port is free again as soon as the run has ended, though connections of the last scrapes may linger."""

    daemon_threads = True
    allow_reuse_address = True

    def server_bind(self) -> None:
        """Without a look at the name server for the host's full name, which may take seconds and is used for nothing here."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]
        self.setup_environ()


class _Quiet(WSGIRequestHandler):
    timeout = 10.0  # of a connection on which nothing comes

    def log_message(self, format: str, *args: Any) -> None:
        pass
