"""Manifests in examples/kubernetes have only fields that Kubernetes and KubeRay know."""

import json
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from serve.server.cli import config_from

FOLDER = Path(__file__).parents[1] / "examples" / "kubernetes"
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(required="", **properties):
    """The schema of an object that has no other fields than these."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(schema):
    return {"type": "array", "minItems": 1, "items": schema}


PROBE = fields(
    "httpGet",
    httpGet=fields("path port", path=TEXT, port=TEXT),
    periodSeconds=COUNT,
    failureThreshold=COUNT,
)
CONTAINER = fields(
    "name image",
    name=TEXT,
    image=TEXT,
    args=listed(TEXT),
    env=listed(
        fields(
            "name",
            name=TEXT,
            value=TEXT,
            valueFrom=fields("secretKeyRef", secretKeyRef=fields("name key", name=TEXT, key=TEXT)),
        )
    ),
    ports=listed(fields("containerPort", name=TEXT, containerPort=COUNT)),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=fields(requests=TEXTS, limits=TEXTS),
    volumeMounts=listed(
        fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly={"type": "boolean"})
    ),
)
POD = fields(
    "containers",
    terminationGracePeriodSeconds=COUNT,
    containers=listed(CONTAINER),
    volumes=listed(
        fields(
            "name persistentVolumeClaim",
            name=TEXT,
            persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly={"type": "boolean"}),
        )
    ),
)
METADATA = fields("name", name=TEXT, labels=TEXTS)
TEMPLATE = fields("spec", metadata=fields(labels=TEXTS), spec=POD)
GROUP = {"rayStartParams": TEXTS, "template": TEMPLATE}
SPECS = {
    ("apps/v1", "Deployment"): fields(
        "selector template",
        replicas=COUNT,
        selector=fields("matchLabels", matchLabels=TEXTS),
        template=TEMPLATE,
    ),
    ("v1", "Service"): fields(
        "selector ports",
        selector=TEXTS,
        ports=listed(fields("port", name=TEXT, port=COUNT, targetPort=TEXT)),
    ),
    ("ray.io/v1", "RayService"): fields(
        "serveConfigV2 rayClusterConfig",
        serveConfigV2=TEXT,
        rayClusterConfig=fields(
            "headGroupSpec",
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=fields("rayStartParams template", **GROUP),
            workerGroupSpecs=listed(
                fields(
                    "groupName rayStartParams template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    **GROUP,
                )
            ),
        ),
    ),
}
MANIFESTS = [
    manifest
    for file in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_have_known_fields(manifest):
    spec = SPECS[manifest["apiVersion"], manifest["kind"]]
    schema = fields(
        "apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec
    )
    jsonschema_rs.validate(schema, json.loads(json.dumps(manifest)))
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(schema, {**manifest, "spec": {**manifest["spec"], "replica": 1}})


def test_settings_of_the_ray_service_are_those_of_stu_serve():
    (service,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    config = config_from({**application["args"], "ray": True})
    assert (config.replicas, config.cluster.max_replicas) == (1, 8)
    (groups,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert groups["maxReplicas"] == config.cluster.max_replicas


def test_a_pod_outlives_the_requests_that_it_drains():
    (deployment,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert int(container["args"][1]) < pod["terminationGracePeriodSeconds"]
