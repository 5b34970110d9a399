"""A real Prometheus over dashboards/, for tests."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import REPOSITORY, eventually, free_port


class Prometheus:
    def __init__(self, port: int):
        self._base = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self._base}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """Of every series that `query` finds now, the defined ones."""
        found = (float(series["value"][1]) for series in self.get("/api/v1/query", query=query)["result"])
        return [value for value in found if not math.isnan(value)]

    def targets(self, job: str) -> list[dict[str, str]]:
        """Labels of what answers the scrapes of `job`."""
        return [target["labels"] for target in self.get("/api/v1/targets", state="active")["activeTargets"]
                if target["labels"]["job"] == job and target["health"] == "up"]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("/api/v1/alerts")["alerts"] if alert["state"] == "firing"}


@contextlib.contextmanager
def prometheus(folder: Path, dashboard: str) -> Iterator[Prometheus]:
    """With dashboards/prometheus.yml as it is, but for shorter intervals and Ray's dashboard, which is not at its usual port here."""
    source = REPOSITORY / "dashboards"
    tree = yaml.safe_load((source / "prometheus.yml").read_text().replace("http://127.0.0.1:8265", dashboard))
    tree["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    tree["rule_files"] = [str(source / name) for name in tree["rule_files"]]
    for job in tree["scrape_configs"]:
        for asked in job["http_sd_configs"]:
            asked["refresh_interval"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(tree))
    port = free_port()
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                                    f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT)
    found = Prometheus(port)

    def ready() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        try:
            return bool(found.get("/api/v1/status/runtimeinfo"))
        except OSError:
            return False

    try:
        eventually(ready, 60, "Prometheus answers")
        yield found
    finally:
        process.terminate()
        process.wait(timeout=20)
