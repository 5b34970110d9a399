"""The built-in page in a real Chromium, at the width of a desk and of a hand."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry

from actors.telemetry.exporter import PAGE, Exporter, json_route
from actors.telemetry.live_state import LiveStatus
from orchestrator.config.run_config import parse
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes
from tests.cluster.browser import Browser
from tests.told_events import told

CONFIG = parse({}, ["run.name=shown", "training.steps=1000", "layout.pipeline=2", "layout.expert=2", "topology.virtual_nodes=2",
                    "topology.ranks_per_node=2"])
LAYOUT = choose(virtual_nodes(2, 2), CONFIG.layout, CONFIG.model, CONFIG.stages)
OF_THE_STEP = {"seconds": 0.5, "tokens_per_second": 12345.0, "overlap_ratio": 0.75, "bubble_ratio": 0.125, "nodes": 2, "mfu": 0.41,
               "spent": {"useful": 0.4, "exposed_communication": 0.06, "recovery": 0.04}}
NAMES = "[...document.querySelectorAll('#numbers > div')].map(e => e.innerText.replace(/\\s+/g, ' '))"


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture
def board():
    found = LiveStatus(CONFIG, lambda: LAYOUT)
    now = time.time()
    for step in range(60):
        found.observe("step", OF_THE_STEP | {"step": step, "time": now - 0.5 * (60 - step), "loss": 5 - step / 20})
    for event in (told("generation", time=now - 30, generation=1), told("slow", time=now, rank=3, factor=2.5),
                  told("lost", time=now, members=["gone/0"], reasons=["<script>document.title = 'broken'</script>"]),
                  told("validation", time=now, step=50, loss=2.75), told("checkpoint", time=now, step=40)):
        found.observe("event", event)
    found.observe("timeline", {"step": 59, "seconds": 0.5, "spans": [(rank, lane, 0.1 * rank, 0.1 * rank + 0.05)
                                                                     for rank in range(4) for lane in ("compute", "exchange")]})
    return found


@pytest.fixture
def served(board):
    exporters = []

    def serve(token=None):
        routes = {"/": lambda: ("text/html; charset=utf-8", PAGE.read_bytes()), "/status.json": json_route(board.state), "/timeline.json": json_route(board.timeline)}
        exporters.append(Exporter(CollectorRegistry(), ("127.0.0.1",), 0, routes, token))
        return f"http://127.0.0.1:{exporters[-1].port}/"

    def end():
        while exporters:
            exporters.pop().close()

    serve.end = end
    yield serve
    end()


@pytest.mark.parametrize("width", [1280, 390])
def test_all_of_a_run_is_shown_and_fits(browser, served, width, tmp_path):
    browser.open(served(), width)
    browser.until("document.getElementById('state').textContent === 'training'")
    shown = " | ".join(browser.value(NAMES))
    for words in ("step 60 / 1000", "loss 2.0500", "validation 2.7500", "tokens/s 12,345", "goodput 80.0 %", "MFU 41.0 %", "overlap 75 %",
                  "nodes 2", "checkpoint step 40"):
        assert words in shown, shown
    assert browser.value("document.querySelectorAll('.node:not(.gone) .rank').length") == 4
    assert "2.5× slow" in browser.value("document.querySelector('.rank.slow').textContent")
    assert "gone: lost" in browser.value("document.querySelector('.node.gone').textContent")
    assert browser.until("document.querySelectorAll('#timeline rect').length") == 8
    assert browser.value("document.querySelectorAll('#loss polyline, #speed polyline').length") == 2
    assert browser.value("document.querySelectorAll('#events li').length") == 5
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.title") == "DualRay"  # what a run says is text, never markup
    browser.screenshot(tmp_path / "page.png")
    assert not browser.problems


def test_it_follows_the_run_and_says_when_nobody_answers(browser, served, board):
    url = served()
    browser.open(url, 1280)
    browser.until("document.getElementById('state').textContent === 'training'")
    board.observe("event", told("waiting", time=time.time(), reason="1 of at least 2 nodes can be used"))
    browser.until("document.getElementById('state').textContent === 'waiting: 1 of at least 2 nodes can be used'")
    board.observe("step", OF_THE_STEP | {"step": 999, "time": time.time(), "loss": 1.5})
    browser.until("document.getElementById('state').textContent === 'saving: all steps are done'")
    served.end()
    browser.until("document.getElementById('state').textContent.startsWith('the run does not answer')")


def test_a_loss_that_is_no_number_breaks_nothing(browser, served, board):
    board.observe("event", told("validation", time=time.time(), step=55, loss=float("nan")))
    browser.open(served(), 1280)
    browser.until("document.getElementById('state').textContent === 'training'")
    assert "validation –" in " | ".join(browser.value(NAMES))


def test_a_stalled_run_does_not_look_well(browser, served, board):
    board.observe("step", OF_THE_STEP | {"step": 60, "time": time.time() - 120, "loss": 1.5})
    browser.open(served(), 1280)
    browser.until("document.getElementById('state').textContent === 'training'")  # it has just been taken up
    board._since -= 120
    browser.until("document.getElementById('state').textContent.startsWith('stalled for 2')")


def test_it_asks_for_rays_token(browser, served):
    browser.open(served("secret"), 1280)
    browser.until("document.querySelector('form input') !== null")
    browser.value("document.querySelector('form input').value = 'secret'; document.querySelector('form button').click()")
    browser.until("document.getElementById('state').textContent === 'training'")
    assert "secret" not in browser.value("location.href")
