"""Files for clusters of others: valid, and true of what they start."""

from __future__ import annotations

import re
import shlex

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import cli
from orchestrator.config.run_config import load
from tests.cluster import REPOSITORY
from tests.jobs.kuberay import SPECS

FOLDER = REPOSITORY / "jobs" / "cluster"
_VERSION = "1.31"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def clusters() -> list[dict]:
    return [found["spec"].get("rayClusterSpec", found["spec"]) for name in ("raycluster.yaml", "rayjob.yaml") for found in documents(name)
            if found["kind"] in SPECS]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_takes_them(name):
    for found in documents(name):
        if found["kind"] in SPECS:
            assert found["apiVersion"] == "ray.io/v1" and set(found) == {"apiVersion", "kind", "metadata", "spec"}
            jsonschema.validate(found["spec"], SPECS[found["kind"]])
        else:
            kubernetes_validate.validate(found, _VERSION, strict=True)


def test_kuberays_schema_here_refuses_what_is_misspelt():
    spec = documents("rayjob.yaml")[0]["spec"]
    for wrong in ({"entryPoint": "x"}, {"backoffLimit": "2"}, {"rayClusterSpec": {"workerGroupSpecs": []}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spec | wrong, SPECS["RayJob"])


@pytest.mark.parametrize("spec", clusters())
def test_kubernetes_takes_their_pods(spec):
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]},
                                     _VERSION, strict=True)


@pytest.mark.parametrize("spec", clusters())
def test_a_stop_leaves_time_to_save(spec):
    """Kubernetes kills after the grace period what Ray was to stop within its own."""
    pod = spec["headGroupSpec"]["template"]["spec"]
    wait = next(entry["value"] for entry in pod["containers"][0]["env"] if entry["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert float(wait) < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_ray_and_python_are_the_same_everywhere():
    assert ray.__version__ in (FOLDER / "Dockerfile").read_text()
    assert {spec["rayVersion"] for spec in clusters()} == {ray.__version__}


def test_the_job_starts_a_run_that_is_not_refused():
    words = shlex.split(documents("rayjob.yaml")[0]["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    parser = cli.Parser()
    cli.arguments(parser)
    options = parser.parse_args(words[3:])
    name = options.config.removeprefix("/home/ray/dualray/")
    assert load(REPOSITORY / name, options.overrides).run.directory == "/shared/runs"


def test_rays_launcher_takes_its_file():
    config = documents("launcher.yaml")[0]
    validate_config(prepare_config(config))
    commands = " ".join(config["head_start_ray_commands"])
    assert re.search(r"RAY_JOB_STOP_WAIT_TIME_S=\d+", commands)
