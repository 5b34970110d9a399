"""What it costs to be watched, and to be conducted: step time while every rank and the coordinator are scraped each second, against
nobody asking; and what the state machine of the run takes of a step.

Ranks are processes with held compute lanes (`churn_rank.py`), driven by the product's trainer, each with its exporter, and so is the
trainer; a process of its own asks all of them over HTTP, as Prometheus does, spread over the interval. The run is one: stretches
with scrapes and stretches without take turns, so that what else changes on the machine meets both.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from actors.data.batching import Batch
from actors.data.dataset import Dataset
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Trainer
from actors.telemetry.exporter import Exporter, RunMetrics
from jobs import corpus
from jobs.benches.churn.bench import small
from jobs.benches.churn.run import Said, TokenizedBatches, train
from jobs.benches.telemetry.rank import metered_rank
from jobs.driver import session
from orchestrator.config.run_config import Real, RunConfig, Section
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes

BAR, PROTOCOL_BAR = 0.01, 1e-3
_SETTLE_SECONDS = 3.0


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    nodes: int = Field(4, ge=1)
    ranks: int = Field(4, ge=1, description="of a node")
    interval: Real = Field(1.0, gt=0, description="seconds between two scrapes of the same exporter")
    milliseconds: Real = Field(30.0, gt=0, description="of each compute segment of a layer, for a sequence")
    seconds: Real = Field(18.0, gt=0, description="of a stretch")
    pairs: int = Field(8, ge=2, description="of stretches, with and without")


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Step times of each stretch, their ratio, and whether the bar holds."""
    data = session.data_path(config)
    corpus.prepare(config, data)
    size = settings.nodes * settings.ranks
    config = small(config, settings.nodes, settings.ranks, [
        "run.name=telemetry", f"data.path={data}", f"training.batch_sequences={2 * size}", "training.dtype=float32",
        "model.n_routed_experts=16", "elastic.silence_seconds=30"])
    layout = choose(virtual_nodes(settings.nodes, settings.ranks), config.layout, config.model, config.stages)
    rows, metrics, ports = TokenizedBatches(config, Dataset.open(data), 40), RunMetrics(), _free_ports(size)
    exporter = Exporter(metrics.registry, ("127.0.0.1",), 0)
    alternating = Alternating(settings, [exporter.port, *ports], metrics)
    own = [(settings.milliseconds / 1000, port) for port in ports]
    with tempfile.TemporaryDirectory() as folder, ProcessRanks(config, size, metered_rank, own, start_method="forkserver") as ranks:
        train(ranks, config, layout, Cycled(rows), folder, beside=alternating)
    exporter.close()
    return _judged(alternating, settings, size)


class Cycled:
    """Batches for ever: what is learnt is not the question."""

    def __init__(self, rows: TokenizedBatches):
        self._rows, self.steps = rows, sys.maxsize

    def batch(self, step: int) -> Batch:
        return replace(self._rows.batch(step % self._rows.steps), step=step)


class Alternating:
    """Runs beside the training. times: of the steps of each stretch, by whether it was scraped, in turn.
    protocol: seconds of the run's state machine for a step."""

    def __init__(self, settings: Settings, ports: Sequence[int], metrics: RunMetrics):
        self._settings, self._ports, self._metrics = settings, ports, metrics
        self.times: dict[bool, list[list[float]]] = {True: [], False: []}
        self.scrapes, self.scrape_seconds, self.bytes, self.protocol = 0, [], 0, float("inf")

    def __call__(self, trainer: Trainer, told: Said) -> None:
        context = multiprocessing.get_context("spawn")
        asking, answers, pause = context.Event(), context.Queue(), threading.Event()
        scraper = context.Process(target=_scrape, args=(self._ports, self._settings.interval, asking, answers), daemon=True)
        scraper.start()
        try:
            while len(told.steps) < 3:
                pause.wait(0.05)
            first, spent = len(told.steps), trainer.protocol_seconds
            for stretch in range(2 * self._settings.pairs):
                scraped = stretch % 4 in (1, 2)  # without, with, with, without: a drift meets both
                (asking.set if scraped else asking.clear)()
                pause.wait(min(_SETTLE_SECONDS, self._settings.seconds))
                before = len(told.steps)
                pause.wait(self._settings.seconds)
                steps = told.steps[before:]
                for values in steps:
                    self._metrics.observe("step", values)
                self.times[scraped].append([step["seconds"] for step in steps])
                print(f"stretch {stretch}, {'scraped' if scraped else 'not scraped'}: {statistics.median(self.times[scraped][-1]):.5f} s",
                      file=sys.stderr, flush=True)
                self._take(answers)
            self.protocol = (trainer.protocol_seconds - spent) / (len(told.steps) - first)
        finally:
            scraper.terminate()
            scraper.join()

    def _take(self, answers: Any) -> None:
        """What the scraper has told; often enough that its pipe never fills."""
        while not answers.empty():
            seconds, size = answers.get()
            self.scrapes, self.bytes = self.scrapes + 1, max(self.bytes, size)
            self.scrape_seconds.append(seconds)


def _scrape(ports: Sequence[int], interval: float, asking: Any, answers: Any) -> None:
    """Each exporter once in an interval, one after the other."""
    due = time.monotonic()
    while True:
        for port in ports:
            asking.wait()
            due = max(due + interval / len(ports), time.monotonic() - interval)
            time.sleep(max(0.0, due - time.monotonic()))
            started = time.perf_counter()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                size = len(answer.read())
            answers.put((time.perf_counter() - started, size))


def _judged(found: Alternating, settings: Settings, size: int) -> dict[str, Any]:
    medians = {scraped: [statistics.median(times) for times in stretches] for scraped, stretches in found.times.items()}
    ratios = [with_ / without for with_, without in zip(medians[True], medians[False], strict=True)]
    ratio, error = statistics.median(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    planned = settings.pairs * settings.seconds / settings.interval * (size + 1)
    checks = {f"scraped every {settings.interval:g} s, a step takes less than {BAR:.0%} longer": ratio - 1 < BAR,
              f"the ratio is known to {BAR:.0%} (standard error of the pairs)": error < BAR,
              f"the state machine takes at most {1000 * PROTOCOL_BAR:g} ms of a step": found.protocol <= PROTOCOL_BAR,
              "at least nine tenths of the scrapes were made": found.scrapes >= 0.9 * planned}
    return {"settings": settings.model_dump(), "ranks": size, "seconds": {"scraped": medians[True], "not scraped": medians[False]},
            "protocol_seconds_a_step": found.protocol, "ratio": ratio, "ratios": ratios, "standard_error": error, "scrapes": found.scrapes,
            "scrape_seconds": statistics.median(found.scrape_seconds), "largest_answer_bytes": found.bytes,
            "checks": checks, "valid": all(checks.values())}


def _free_ports(count: int) -> list[int]:
    """Free when looked for."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
