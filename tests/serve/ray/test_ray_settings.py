"""Settings of engines on a Ray cluster, which are checked without one."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from serve.batch.config import BatchConfig
from serve.ray.cluster import engine_resources
from serve.ray.config import ClusterConfig
from serve.server.config import ServerConfig
from serve.server.replicas.supervisor import ReplicasConfig
from stu.common.errors import UserError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": "cpu"}, "devices.*Ray gives each engine a GPU"),
        ({"engines": 0}, "engines=0.*>= 1"),
        ({"cpus_per_engine": 1.5}, "cpus_per_engine=1.5.*whole number"),
        ({"tensor_parallel": 2}, "tensor_parallel=2.*1 with --ray"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_a_dataset_on_ray_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        BatchConfig(Path("m"), Path("in"), Path("out"), ray=True, **values)


@pytest.mark.parametrize("name", ["engines", "cpus_per_engine"])
def test_settings_of_ray_are_refused_without_it(name):
    with pytest.raises(UserError, match=f"{name}=1 is not allowed: it is for ray alone"):
        BatchConfig(Path("m"), Path("in"), Path("out"), **{name: 1})


@pytest.mark.parametrize(
    "values",
    [
        {"devices": "cpu"},
        {"tensor_parallel": 2},
        {"cluster": ClusterConfig(max_replicas=2), "replicas": 4},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_of_a_server_on_ray_are_checked(values):
    with pytest.raises(UserError, match=r"devices=|tensor_parallel=|max_replicas=2.*at least 4"):
        ServerConfig(Path("m"), ray=True, **values)


@pytest.mark.parametrize(
    "cluster",
    [
        {"max_replicas": 8},
        {"cpus_per_replica": 2},
        {"gpus_per_replica": 1},
        {"scale_up_seconds": 5.0, "max_replicas": 8},
    ],
    ids=str,
)
def test_settings_of_the_cluster_are_refused_without_one(cluster):
    with pytest.raises(UserError, match=r"not allowed.*give.*ray"):
        ServerConfig(Path("m"), cluster=ClusterConfig(**cluster))
    assert ServerConfig(Path("m"), ray=True, cluster=ClusterConfig(**cluster)).cluster.changed


def connect_to(monkeypatch, hosts):
    """Connect to a cluster whose hosts have these resources."""
    nodes = [{"Alive": True, "Resources": host} for host in hosts]
    monkeypatch.setattr("serve.ray.cluster.connect", lambda: Mock(nodes=lambda: nodes))


def resources(monkeypatch, hosts, *arguments, **more):
    """The resources of engines on a cluster whose hosts have these."""
    connect_to(monkeypatch, hosts)
    return engine_resources(*arguments, **more)


def test_the_server_does_not_start_without_a_host_for_a_replica(monkeypatch):
    deployment = pytest.importorskip("serve.ray.deployment")
    connect_to(monkeypatch, [{"CPU": 2.0}])
    arguments = ReplicasConfig(Path("m")), 1, ClusterConfig(cpus_per_replica=4)
    with pytest.raises(UserError, match=r"^cpus_per_replica=4.*at most 2"):
        deployment.deployed_replicas("m", *arguments)


def test_models_on_hosts_without_gpus_need_a_size(monkeypatch):
    build = pytest.importorskip("serve.ray_application").build
    settings = {"model": "m", "models": "other=o"}
    connect_to(monkeypatch, [{"CPU": 8.0}] * 4)
    for more in {}, {"cpus_per_replica": 2}, {"gpus_per_replica": 0}:
        with pytest.raises(UserError, match=r"^several replicas .* cache_gib, or gpus_per_replica"):
            build({**settings, **more})
    build({**settings, "cache_gib": 1})
    build({**settings, "gpus_per_replica": 1})
    connect_to(monkeypatch, [{"CPU": 8.0, "GPU": 2.0}])
    build(settings)  # each has a GPU, though the setting is not given
    with pytest.raises(UserError, match="cache_gib"):
        build({**settings, "gpus_per_replica": 0})


def test_engines_may_be_for_hosts_that_have_yet_to_join(monkeypatch):
    head = {"CPU": 0.0}
    with pytest.raises(UserError, match=r"^cpus_per_replica=1.*at most 0.*gpus_per_replica"):
        resources(monkeypatch, [head], 8, 1, None, name="cpus_per_replica")
    for hosts in [head], [head, {"CPU": 8.0}], [head, {"CPU": 8.0, "GPU": 1.0}]:
        found = resources(monkeypatch, hosts, 8, 1, None, 1)
        assert (found.num_cpus, found.num_gpus, found.count) == (1, 1, 8)
    assert resources(monkeypatch, hosts, 8, 1, None).num_gpus == 1
    assert resources(monkeypatch, hosts, 8, 1, 1.0, 0).num_gpus == 0
    with pytest.raises(UserError, match="cache_gib"):
        resources(monkeypatch, hosts, 8, 1, None, 0)


@pytest.mark.parametrize(
    "values",
    [
        {"max_replicas": 0},
        {"cpus_per_replica": 0},
        {"gpus_per_replica": 2},
        {"scale_up_seconds": -1},
        {"scale_up_seconds": 5.0},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_of_the_cluster_are_checked(values):
    with pytest.raises(UserError, match=next(iter(values))):
        ClusterConfig(**values)


def test_urls_keep_their_slashes():
    files = pytest.importorskip("serve.ray.files")
    assert files.URL.sub(r"\1://", str(Path("s3://bucket/a/b.jsonl"))) == "s3://bucket/a/b.jsonl"
    assert not files.URL.match("/data/a:/b")
