"""The deployment of engines on Ray Serve."""

import threading
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from serve.ray.cluster import engine_resources
from serve.ray.config import ClusterConfig
from serve.ray.engine_replica import EngineReplica
from serve.ray.replicas import RayReplicas
from serve.ray.router import PrefixRouter
from serve.server.replicas.replica import AHEAD
from serve.server.replicas.supervisor import ReplicasConfig

NAME = "engine"
"""Name of the deployment of the first model."""
_starting = threading.Lock()
SHUTDOWN_SECONDS = 60.0
"""Time that the requests of a replica that is not needed any more have to end; those that are left
continue in others."""


def engine_application(
    config: ReplicasConfig, num_replicas: int, cluster: ClusterConfig, name: str = NAME
) -> Any:
    """Return an application of Ray Serve with one engine in each replica.

    Args:
        config: Settings of the replicas. Their devices and `max_waiting` are not used.
        num_replicas: Replicas that always run.
        cluster: Settings of the cluster.
        name: Name of the deployment, which no other of an application has.

    Raises UserError if the cluster has no host for a replica.
    """
    most = cluster.max_replicas or num_replicas
    resources = engine_resources(
        most,
        cluster.cpus_per_replica,
        config.engine.cache_gib,
        cluster.gpus_per_replica,
        name="cpus_per_replica",
    )
    settings = {**asdict(config), "model": str(config.model.absolute())}
    settings["num_threads"] = cluster.cpus_per_replica
    settings["adapters"] = {name: path.absolute() for name, path in config.adapters.items()}
    del settings["devices"], settings["max_waiting"]
    max_running = config.engine.max_running
    scaling: dict[str, Any] = {"num_replicas": num_replicas}
    if most > num_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=num_replicas,
                max_replicas=most,
                # Requests beyond those that a replica decodes together wait.
                target_ongoing_requests=max_running,
                upscale_delay_s=cluster.scale_up_seconds,
                downscale_delay_s=cluster.scale_down_seconds,
                look_back_period_s=max(1.0, min(30.0, cluster.scale_up_seconds)),
                metrics_interval_s=max(0.5, min(10.0, cluster.scale_up_seconds / 3)),
            )
        }
    deployment = serve.deployment(
        EngineReplica,
        name=name,
        ray_actor_options=resources.options(),
        max_ongoing_requests=round(2 * AHEAD * max_running),
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **scaling,
    )
    return deployment.bind(settings)


def deployed_replicas(
    name: str, config: ReplicasConfig, num_replicas: int, cluster: ClusterConfig
) -> RayReplicas:
    """Return replicas that this process deploys on a Ray cluster, as an application of this name,
    and ends with itself.

    Raises UserError if there is no cluster, or if it has no host for a replica.
    """
    application = engine_application(config, num_replicas, cluster)

    def deploy() -> Any:
        with _starting:  # as other models of this process do at the same time
            serve.start(proxy_location="Disabled")  # this process is the HTTP server
        return serve.run(application, name=name, route_prefix=None)

    def delete(waits: bool) -> None:
        serve.delete(name, _blocking=waits)

    return handled_replicas(deploy, delete, config, num_replicas)


def handled_replicas(
    connect: Any, disconnect: Any, config: ReplicasConfig, num_replicas: int
) -> RayReplicas:
    """Return replicas of a deployment, given functions as `RayReplicas` takes them."""
    return RayReplicas(
        connect,
        disconnect,
        num_replicas,
        config.engine.max_running,
        config.max_waiting,
        config.watchdog_seconds,
    )
