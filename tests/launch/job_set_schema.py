"""The fields of ConfigMap and JobSet that we write, from the public API, closed to any other.

kubernetes.io/docs/reference (v1: ConfigMap, Job, Pod) and jobset.sigs.k8s.io/docs/reference
(v1alpha2). A misspelled field is refused here as `kubectl apply` refuses it.
"""

from typing import Any

LABEL = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 1}


def closed(required: str, optional: dict[str, Any] | None = None, **properties: Any) -> dict:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": {**properties, **(optional or {})},
    }


def many(item: dict, **bounds: int) -> dict:
    return {"type": "array", "items": item, "minItems": 1, **bounds}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNTS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"google.com/tpu": COUNT, "nvidia.com/gpu": COUNT},
    "minProperties": 1,
}
META = closed("name", name=LABEL, optional={"annotations": TEXTS, "labels": TEXTS})

CONFIG_MAP = closed(
    "apiVersion kind metadata data",
    apiVersion={"const": "v1"},
    kind={"const": "ConfigMap"},
    metadata=META,
    data={**TEXTS, "propertyNames": {"pattern": r"^[-._a-zA-Z0-9]+$"}},
)

SECRET = closed("secretKeyRef", secretKeyRef=closed("name key", name=LABEL, key={"type": "string"}))
CONTAINER = closed(
    "name image command resources volumeMounts",
    name=LABEL,
    image={"type": "string", "minLength": 1},
    command=many({"type": "string"}),
    resources=closed("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=many(
        closed(
            "name mountPath",
            name=LABEL,
            mountPath={"type": "string", "pattern": "^/"},
            readOnly={"type": "boolean"},
        )
    ),
    optional={
        "ports": many(closed("containerPort", containerPort={"type": "integer", "maximum": 65535})),
        "env": many(closed("name valueFrom", name={"type": "string"}, valueFrom=SECRET)),
    },
)
TOLERATION = closed(
    "key operator effect",
    key={"type": "string"},
    operator={"enum": ["Equal", "Exists"]},
    value={"type": "string"},
    effect={"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]},
)
POD = closed(
    "restartPolicy containers volumes nodeSelector",
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    nodeSelector=TEXTS,
    containers=many(CONTAINER),
    volumes=many(closed("name configMap", name=LABEL, configMap=closed("name", name=LABEL))),
    optional={"tolerations": many(TOLERATION)},
)
JOB = closed(
    "parallelism completions backoffLimit template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit={"type": "integer", "minimum": 0},
    template=closed("spec", spec=POD),
)
JOB_SET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=META,
    spec=closed(
        "replicatedJobs",
        failurePolicy=closed("maxRestarts", maxRestarts={"type": "integer", "minimum": 0}),
        replicatedJobs=many(
            closed("name template", name=LABEL, replicas=COUNT, template=closed("spec", spec=JOB))
        ),
    ),
)
