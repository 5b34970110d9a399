"""What Prometheus reads, over HTTP as it does."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from actors.calls.messages import LossSums, StepReport
from actors.comm.traffic import Sent
from actors.hosts.auth_token import NoToken, wanted_token
from actors.telemetry.exporter import (
    AUTO,
    Exporter,
    PortInUse,
    RankMetrics,
    RunMetrics,
    _Scrapes,
    json_route,
    listening,
    reachable,
)
from orchestrator.schedule.ir.spans import Span, figures
from tests.told_events import told

HOST = "127.0.0.1"


def read(exporter, path):
    with urllib.request.urlopen(f"http://{HOST}:{exporter.port}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def series(text):
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


@pytest.fixture
def serve():
    served = []

    def make(metrics, port=0, routes=None, **options):
        served.append(Exporter(metrics.registry, (HOST,), port, routes, **options))
        return served[-1]

    yield make
    for exporter in served:
        exporter.close()


def report(step):
    spans = [Span(0, "compute", "F0.0", 0.0, 1.0), Span(0, "exchange", "F0.0 dispatch", 1.0, 1.5)]
    return StepReport(rank=0, step=step, losses=LossSums(), gradient_norm=1.0, digests=(0, 0), figures=figures(spans, 0.0, 2.0),
                      seconds=2.0, bytes_sent=100, load={}, exchanged=Sent(across=30, inside=7))


def test_a_rank_counts_its_steps(serve):
    metrics = RankMetrics()
    exporter = serve(metrics)
    for step in (4, 5):
        metrics.observe(report(step))
    kind, text = read(exporter, "/metrics")
    assert kind.startswith("text/plain")
    found = series(text)
    assert found["dualray_rank_step"] == 5 and found["dualray_rank_step_seconds"] == 2
    assert found["dualray_rank_compute_seconds_total"] == 2 and found["dualray_rank_pipeline_sent_bytes_total"] == 200
    assert found["dualray_rank_exposed_communication_seconds_total"] == 1 and found["dualray_rank_overlap_ratio"] == 0
    assert found["dualray_rank_exchange_across_nodes_bytes_total"] == 60
    assert found["dualray_rank_exchange_inside_node_bytes_total"] == 14


STEP = {"step": 7, "loss": 4.5, "tokens": 512, "tokens_per_second": 2000.0, "seconds": 0.25, "overlap_ratio": 0.5,
        "bubble_ratio": 0.1, "exposed_comm_seconds": 0.02, "gradient_norm": 1.5, "learning_rate": 1e-3, "busiest_expert": 1.25,
        "generation": 1, "nodes": 2, "bytes_across_nodes": 300, "bytes_inside_nodes": 70, "time": 1600.5,
        "spent": {"useful": 0.2, "recovery": 0.05}}


def test_the_run_tells_what_the_trainer_told_it(serve):
    metrics = RunMetrics()
    exporter = serve(metrics)
    metrics.observe("step", STEP)
    metrics.observe("step", STEP | {"step": 8})
    metrics.observe("event", told("validation", step=8, loss=4.25, time=1.0))
    metrics.observe("event", told("checkpoint", step=8, time=1700.5))
    metrics.observe("event", told("generation", time=1.0, nodes=2))
    metrics.observe("load", {1: [3, 4]})
    found = series(read(exporter, "/metrics")[1])
    assert found["dualray_committed_step"] == 8 and found["dualray_loss"] == 4.5 and found["dualray_tokens_total"] == 1024
    assert found["dualray_validation_loss"] == 4.25 and found["dualray_checkpoint_step"] == 8
    assert found["dualray_checkpoint_timestamp_seconds"] == 1700.5 and found["dualray_expert_load_ratio"] == 1.25
    assert found["dualray_committed_step_timestamp_seconds"] == 1600.5 and found['dualray_spent_seconds_total{on="useful"}'] == 0.4
    assert found['dualray_spent_seconds_total{on="recovery"}'] == 0.1 and found['dualray_spent_seconds_total{on="data"}'] == 0
    assert found["dualray_exchange_across_nodes_bytes_total"] == 600 and found["dualray_exchange_inside_nodes_bytes_total"] == 140


def test_who_is_slow_is_a_series_while_it_is(serve):
    metrics, name = RunMetrics(), 'dualray_slow_factor{lane="exchange",node="a",peer="2",rank="1"}'
    exporter = serve(metrics)
    slow = told("slow", rank=1, node="a", peer=2, peer_node="b", lane="exchange", factor=9.5)
    compute = {"rank": 1, "node": "a", "peer": None, "lane": "compute"}

    def shown():
        return {key: value for key, value in series(read(exporter, "/metrics")[1]).items() if "slow" in key}

    metrics.observe("event", slow)
    metrics.observe("event", told("slow", **compute, factor=2.0))
    assert shown() == {name: 9.5, 'dualray_slow_factor{lane="compute",node="a",peer="",rank="1"}': 2.0}
    metrics.observe("event", told("slow_over", **compute, factor=1.0))
    assert shown() == {name: 9.5}
    metrics.observe("event", told("placement", time=1.0))
    assert shown() == {}
    metrics.observe("event", slow)
    metrics.observe("event", told("generation", time=1.0, nodes=2))
    assert shown() == {}


def test_targets_are_listed_for_service_discovery(serve):
    targets = [{"targets": ["10.0.0.1:9000"], "labels": {"role": "rank", "rank": "0"}}]
    kind, text = read(serve(RunMetrics(), routes={"/targets": json_route(lambda: targets)}), "/targets")
    assert kind == "application/json" and json.loads(text) == targets
    assert answer(serve(RankMetrics()), "/targets") == 404  # a rank has none


def test_a_port_in_use_is_refused_in_one_line(serve):
    port = serve(RunMetrics()).port
    with pytest.raises(PortInUse) as caught:
        serve(RunMetrics(), port)
    assert str(caught.value) == (f"telemetry.port = {port}: cannot listen on {HOST} (Address already in use); "
                                 "0 takes any free port")


def test_a_host_that_is_not_ours_is_refused_in_one_line():
    with pytest.raises(PortInUse, match="^telemetry.host = not.an.address: an address of the node"):
        Exporter(RunMetrics().registry, ("not.an.address",), 0)


def test_the_next_run_takes_the_same_port_at_once(serve):
    first = Exporter(RunMetrics().registry, (HOST,), 0)
    with socket.create_connection((HOST, first.port), timeout=10) as scrape:
        scrape.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while scrape.recv(65536):  # the exporter closes first, so that its end lingers in TIME_WAIT
            pass
    first.close()
    second = serve(RunMetrics(), first.port)
    assert "dualray_loss" in read(second, "/metrics")[1]


def test_a_client_that_says_nothing_holds_up_no_end():
    exporter = Exporter(RunMetrics().registry, (HOST,), 0)
    with socket.create_connection((HOST, exporter.port), timeout=10):
        read(exporter, "/metrics")  # by then the silent one has been accepted, and is listened to
        began = time.monotonic()
        exporter.close()
        assert time.monotonic() - began < 8  # it would be for 10 s


def test_runs_beside_one_another_take_the_ports_that_are_looked_at(serve):
    assert 9464 <= serve(RunMetrics(), AUTO).port < serve(RunMetrics(), AUTO).port <= 9473


def answer(exporter, path, method="GET", **headers):
    request = urllib.request.Request(f"http://{HOST}:{exporter.port}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_can_be_changed_and_a_token_is_asked_for(serve):
    rank = serve(RankMetrics(), token="secret")
    assert answer(rank, "/") == answer(rank, "/metrics") == 401 and answer(rank, "/metrics?token=secret") == 200
    open_to_all, guarded = serve(RunMetrics()), serve(RunMetrics(), routes={"/": lambda: ("text/html", b"page")}, token="secret")
    assert [answer(open_to_all, "/metrics", method) for method in ("GET", "POST", "PUT", "DELETE")] == [200, 405, 405, 405]
    assert answer(guarded, "/metrics") == answer(guarded, "/metrics", Authorization="Bearer other") == 401
    assert answer(guarded, "/targets?token=other") == 401 and answer(guarded, "/") == 200  # the page asks for it
    assert answer(guarded, "/metrics", Authorization="Bearer secret") == answer(guarded, "/metrics?token=secret") == 200


def test_the_token_is_rays(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "unused")
    assert wanted_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert wanted_token() == "unused"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("kept in a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert wanted_token() == "kept in a file"
    (tmp_path / "token").unlink()
    with pytest.raises(NoToken, match="^RAY_AUTH_MODE = token: "):
        wanted_token()


def test_exporters_listen_to_the_cluster_only_where_there_is_one():
    assert listening("auto", "10.1.1.1", False) == (HOST,) and listening("auto", "10.1.1.1", True) == ("10.1.1.1", HOST)
    assert listening("0.0.0.0", "10.1.1.1", False) == ("0.0.0.0",) and listening("auto", HOST, True) == (HOST,)


def test_all_addresses_have_one_port():
    exporter = Exporter(RunMetrics().registry, ("127.0.0.2", HOST), 0)
    try:
        for host in (HOST, "127.0.0.2"):
            with urllib.request.urlopen(f"http://{host}:{exporter.port}/metrics", timeout=10) as found:
                assert found.status == 200
    finally:
        exporter.close()


@pytest.mark.parametrize("listen, expected", [("0.0.0.0", "10.1.1.1"), ("::", "10.1.1.1"), ("127.0.0.1", "127.0.0.1")])
def test_where_others_reach_an_exporter(listen, expected):
    assert reachable(listen, "10.1.1.1") == expected


def test_losses_and_recoveries_are_counted(serve):
    metrics = RunMetrics()
    exporter = serve(metrics)

    def shown(*names):
        found = series(read(exporter, "/metrics")[1])
        return [found[f"dualray_{name}"] for name in names]

    names = ("lost_ranks_total", "recoveries_total", "recovery_seconds", "moved_state_bytes_total", "waiting_for_nodes")
    metrics.observe("event", told("generation", time=1.0, step=0, nodes=2))
    assert shown(*names) == [0, 0, 0, 0, 0]
    metrics.observe("event", told("lost", members=["a/0", "a/1"]))
    metrics.observe("event", told("waiting", reason="1 of at least 2 nodes can be used"))
    assert shown(*names) == [2, 0, 0, 0, 1]
    metrics.observe("event", told("generation", step=3, seconds=0.75, bytes=4096, nodes=1))
    metrics.observe("event", told("lost", members=["b/0"]))
    metrics.observe("event", told("generation", step=5, seconds=0.5, bytes=1024, nodes=1))
    assert shown(*names) == [3, 2, 0.5, 5120, 0]
    metrics.observe("event", told("lost", members=["a/0", "b/0"]))
    metrics.observe("event", told("resumed", step=4, steps_to_redo=1))
    metrics.observe("event", told("generation", step=4, recovery_seconds=9.5, nodes=2))
    assert shown(*names) == [5, 3, 9.5, 5120, 0], "state that came from a checkpoint is the costliest recovery"


def test_what_a_run_says_last_is_waited_for_only_where_somebody_listens(serve):
    metrics = RunMetrics()
    alone, watched, heard = serve(metrics), serve(metrics), []
    began = time.monotonic()
    alone.last_words(60)
    assert time.monotonic() - began < 5
    read(alone, "/metrics")  # somebody looked once
    alone.last_words(60)
    assert time.monotonic() - began < 5
    read(watched, "/metrics")
    read(watched, "/metrics")
    watched._scrapes = {client: _Scrapes(scrapes.last, 20.0) for client, scrapes in watched._scrapes.items()}  # as if one had come so
    # much later than the other
    metrics.ended()
    waiting = threading.Thread(target=lambda: heard.append(watched.last_words(60)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and not heard
    while waiting.is_alive():  # a scrape before the thread waits is one of before
        assert series(read(watched, "/metrics")[1])["dualray_ended"] == 1
    assert heard and time.monotonic() - began < 30


def test_every_client_that_asks_regularly_is_waited_for_and_none_that_looks_elsewhere(serve):
    exporter, heard = serve(RunMetrics()), []
    exporter._scrapes = {"10.0.0.9": _Scrapes(time.monotonic(), 20.0)}
    waiting = threading.Thread(target=lambda: heard.append(exporter.last_words(60)))
    waiting.start()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(exporter, "/favicon.ico")
    read(exporter, "/metrics")  # another client
    waiting.join(0.3)
    assert waiting.is_alive() and set(exporter._scrapes) == {"10.0.0.9", HOST}
    while waiting.is_alive():
        exporter._note_scrape("10.0.0.9")
    assert heard


def test_a_run_says_that_it_has_ended_when_only_scores_and_the_save_are_left(serve):
    metrics = RunMetrics(steps=3, save_every=2)
    exporter = serve(metrics)

    def shown(name):
        return series(read(exporter, "/metrics")[1])[f"dualray_{name}"]

    metrics.observe("step", STEP | {"step": 1})
    assert (shown("ended"), shown("checkpoint_every_steps")) == (0, 2)
    metrics.observe("step", STEP | {"step": 2})
    assert shown("ended") == 1


def test_a_run_that_goes_on_remembers_what_it_saved_and_does_not_count_undone_steps_twice(serve):
    metrics = RunMetrics()
    exporter = serve(metrics)
    metrics.recall([told("checkpoint", time=3.0, step=4), told("validation", time=4.0, loss=2.5, step=4),
                    told("checkpoint", time=5.0, step=6), told("lost", members=["a/0"])])
    metrics.observe("step", STEP | {"spent": {"useful": 2.0, "recovery": 31.0}, "redone": 30.0})
    found = series(read(exporter, "/metrics")[1])
    assert [found[f"dualray_{name}"] for name in ("checkpoint_step", "checkpoint_timestamp_seconds", "validation_loss", "lost_ranks_total")] == [
        6, 5.0, 2.5, 0]
    assert found['dualray_spent_seconds_total{on="recovery"}'] == 1.0 and found['dualray_spent_seconds_total{on="useful"}'] == 2.0
