"""What KubeRay's `ray.io/v1` takes: its Go types (github.com/ray-project/kuberay, ray-operator/apis/ray/v1/rayjob_types.go and
raycluster_types.go) as JSON schema, pod templates left to Kubernetes' own."""

from __future__ import annotations

from typing import Any

_TEXT, _NUMBER, _FLAG, _COUNT = {"type": "string"}, {"type": "number"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}


def _section(required: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": keys}


_POD = {"type": "object", "required": ["spec"]}
_HEAD = _section(("rayStartParams", "template"), serviceType=_TEXT, headService={"type": "object"}, enableIngress=_FLAG,
                 rayStartParams=_TEXTS, template=_POD)
_WORKERS = _section(("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"), groupName=_TEXT, replicas=_COUNT,
                    minReplicas=_COUNT, maxReplicas=_COUNT, numOfHosts=_COUNT, rayStartParams=_TEXTS, template=_POD,
                    scaleStrategy=_section(workersToDelete={"type": "array"}, multihostReplicasToDelete={"type": "array"}))
CLUSTER = _section(("headGroupSpec",), headGroupSpec=_HEAD, workerGroupSpecs={"type": "array", "items": _WORKERS}, rayVersion=_TEXT,
                   enableInTreeAutoscaling=_FLAG, autoscalerOptions={"type": "object"}, headServiceAnnotations=_TEXTS, suspend=_FLAG)
JOB = _section(("entrypoint",), activeDeadlineSeconds=_COUNT, backoffLimit=_COUNT, rayClusterSpec=CLUSTER, submitterPodTemplate=_POD,
               metadata=_TEXTS, clusterSelector=_TEXTS, submitterConfig=_section(backoffLimit=_COUNT), managedBy=_TEXT,
               deletionStrategy={"type": "object"}, entrypoint=_TEXT, runtimeEnvYAML=_TEXT, jobId=_TEXT,
               submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]}, entrypointResources=_TEXT,
               entrypointNumCpus=_NUMBER, entrypointNumGpus=_NUMBER, ttlSecondsAfterFinished=_COUNT, shutdownAfterJobFinishes=_FLAG,
               suspend=_FLAG, schedule=_TEXT)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}
