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
    lifecycle=fields(preStop=fields("exec", exec=fields("command", command=listed(TEXT)))),
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
            rayVersion=TEXT,
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


def test_the_image_has_the_programs_that_run_in_it():
    """Triton needs a C compiler and its headers on GPUs, and KubeRay's probes wget."""
    text = (FOLDER.parents[1] / "docs" / "Containerfile").read_text().replace("\\\n", "")
    installed = next(line for line in text.splitlines() if "apt-get install" in line).split()
    assert {"gcc", "libc6-dev", "wget"} <= set(installed)


def ray_service():
    """The specification of the service, and its part for Ray Serve."""
    (service,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "RayService"]
    return service["spec"], yaml.safe_load(service["spec"]["serveConfigV2"])


def test_settings_of_the_ray_service_are_those_of_stu_serve():
    spec, serve = ray_service()
    (application,) = serve["applications"]
    config = config_from({**application["args"], "ray": True})
    cluster = config.cluster
    # Without it the service could not be built before a pod with a GPU has joined.
    assert (config.replicas, cluster.max_replicas, cluster.gpus_per_replica) == (1, 8, 1)
    (groups,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert groups["maxReplicas"] == cluster.max_replicas
    # A replica of `http` beside an engine needs no pod of its own; two would share no responses.
    (http,) = application["deployments"]
    assert http["num_replicas"] == 1
    (container,) = groups["template"]["spec"]["containers"]
    cpus = http["ray_actor_options"]["num_cpus"] + cluster.cpus_per_replica
    assert cpus <= int(container["resources"]["limits"]["cpu"])


@pytest.mark.slow
def test_the_ray_service_follows_the_schema_of_ray_serve():
    schema = pytest.importorskip("ray.serve.schema")
    _, serve = ray_service()
    service = schema.ServeDeploySchema(**serve)
    (application,), (given,) = service.applications, serve["applications"]
    # Ray Serve ignores fields that it does not know.
    for parsed, values in (
        (service, serve),
        (service.http_options, serve["http_options"]),
        (application, given),
        (application.deployments[0], given["deployments"][0]),
    ):
        assert values.keys() <= type(parsed).model_fields.keys()
    given["deployments"][0]["num_replicas"] = -1
    with pytest.raises(ValueError, match="num_replicas"):
        schema.ServeDeploySchema(**serve)


def test_a_pod_outlives_the_requests_that_it_drains():
    (deployment,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep", "the Service sends it requests for a while"
    drained = int(seconds) + int(container["args"][1])
    assert 0 < int(seconds) < drained < pod["terminationGracePeriodSeconds"]
