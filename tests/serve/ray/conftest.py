"""A Ray cluster on this machine."""

import os
from contextlib import contextmanager

import pytest

OBJECT_STORE_BYTES = 80 * 2**20
"""The least that Ray allows is 75 MiB."""


@contextmanager
def ray_cluster(num_cpus, **head):
    """A cluster whose head has a number of processors; `add_node` and `remove_node` change it."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    before = dict(os.environ)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": num_cpus,
            "num_gpus": 0,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            **head,
        },
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)
