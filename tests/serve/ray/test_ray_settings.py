"""Settings of engines on a Ray cluster, which are checked without one."""

from pathlib import Path

import pytest

from serve.batch.config import BatchConfig
from serve.ray.config import ClusterConfig
from serve.server.config import ServerConfig
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


@pytest.mark.parametrize("values", [{"devices": "cpu"}, {"tensor_parallel": 2}], ids=str)
def test_settings_of_a_server_on_ray_are_checked(values):
    with pytest.raises(UserError, match=next(iter(values))):
        ServerConfig(Path("m"), ray=True, **values)


@pytest.mark.parametrize(
    "values",
    [{"max_replicas": 0}, {"cpus_per_replica": 0}, {"scale_up_seconds": -1}],
    ids=lambda values: next(iter(values)),
)
def test_settings_of_the_cluster_are_checked(values):
    with pytest.raises(UserError, match=next(iter(values))):
        ClusterConfig(**values)


def test_urls_keep_their_slashes():
    files = pytest.importorskip("serve.ray.files")
    assert files.URL.sub(r"\1://", str(Path("s3://bucket/a/b.jsonl"))) == "s3://bucket/a/b.jsonl"
    assert not files.URL.match("/data/a:/b")
