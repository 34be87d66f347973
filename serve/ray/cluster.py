"""The Ray cluster that a command uses, and the engines that it has room for.

Everything here needs the extra `ray`.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

from stu.common.errors import UserError, requires_extra, setting_name

NAMESPACE = "stu"
USAGE_REPORTS = "RAY_USAGE_STATS_ENABLED"
"""Ray's environment variable that turns its reports to its makers on or off."""


def connect() -> Any:
    """Connect to the Ray cluster at RAY_ADDRESS, or of this host, and return the module `ray`.

    Raises UserError if there is none, or if Ray is not installed.
    """
    os.environ.setdefault(USAGE_REPORTS, "0")
    with requires_extra("ray"):
        import ray
    if not ray.is_initialized():
        try:
            ray.init(
                address="auto",
                namespace=NAMESPACE,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        except ConnectionError as error:
            raise UserError(
                "ray",
                message="--ray: there is no Ray cluster (RAY_ADDRESS="
                f"{os.environ.get('RAY_ADDRESS', '')}): start one with `ray start --head`, or set "
                "RAY_ADDRESS to that of one",
            ) from error
    return ray


def engines_have_gpus(gpus_per_engine: int | None) -> bool:
    """Return whether each engine takes a GPU; by default if a host of the cluster has any now."""
    if gpus_per_engine is None:
        return any(host.get("GPU", 0) >= 1 for host in _hosts())
    return gpus_per_engine > 0


@dataclass(frozen=True)
class EngineResources:
    """Resources that each engine takes of the cluster, and the most engines there may be."""

    num_cpus: int
    num_gpus: int
    count: int

    def options(self) -> dict[str, float]:
        """Return the resources as options of Ray's actors."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def engine_resources(
    count: int | None,
    cpus_per_engine: int,
    cache_gib: float | None,
    gpus_per_engine: int | None = None,
    *,
    name: str = "cpus_per_engine",
) -> EngineResources:
    """Return the resources of `count` engines; None: one for each GPU, or for each host without.

    Args:
        count: Number of engines.
        cpus_per_engine: Processors of each.
        cache_gib: Size of their caches.
        gpus_per_engine: GPUs of each; the hosts may have yet to join the cluster. None: one if a
            host of the cluster has any now.
        name: Name of the setting of `cpus_per_engine`, for errors.

    Raises UserError if the cluster has no such hosts, or if engines that share the memory of a
    host have no `cache_gib`.
    """
    hosts = _hosts()
    num_gpus = sum(int(host.get("GPU", 0)) for host in hosts)
    most = int(max((host.get("CPU", 0) for host in hosts), default=0))
    if gpus_per_engine is None and cpus_per_engine > most:
        fix = ""
        if name == "cpus_per_replica":
            fix = f"give {setting_name('gpus_per_replica')} if others are to join"
        allowed = f"at most {most}, the processors of the cluster's largest host"
        raise UserError(name, cpus_per_engine, allowed, fix)
    if engines_have_gpus(gpus_per_engine):
        return EngineResources(cpus_per_engine, 1, count or num_gpus)
    if count is not None and count > len(hosts) and cache_gib is None:
        raise UserError(
            "cache_gib",
            message="several engines on a host would each take half of its free memory: give "
            f"{setting_name('cache_gib')}",
        )
    return EngineResources(cpus_per_engine, 0, count or len(hosts))


def _hosts() -> list[dict[str, float]]:
    """Return the resources of each host of the cluster."""
    return [node["Resources"] for node in connect().nodes() if node["Alive"]]
