"""An application of Ray Serve with the HTTP interface of `stu-serve`.

    serve run serve.ray_application:build model=/models/mine replicas=2 max_replicas=8

It has a deployment `engine`, whose replicas decode, one more for each of `models`, and `http`,
whose replicas answer clients behind Ray Serve's own HTTP proxies and keep their streams. A stream
goes on in another replica when that of its engine or its host ends. It ends if its client's
connection does, as it does with the host of its proxy or of its `http` replica.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve

from serve.ray.deployment import NAME, engine_application, handled_replicas
from serve.server.access.keys import Keys
from serve.server.cli import config_from
from serve.server.config import ServerConfig, errors_of_model, model_configs
from serve.server.http_server import asgi_app
from serve.server.model_version import replicas_config
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.service import make_service, require_cache_sizes
from stu.common.errors import UserError

OF_HTTP_SERVER = (
    *("host", "port", "uds", "tls_certificate", "tls_key", "drain_seconds"),
    *("header_timeout_seconds", "body_timeout_seconds", "batch_dir"),
)
"""Settings of the HTTP server of `stu-serve`, in whose place are Ray Serve's proxies."""
HTTP_REPLICAS_OPTIONS = {"name": "http", "max_ongoing_requests": 1000}
"""Options of the deployment that answers clients; a configuration file may set others."""


def build(settings: Mapping[str, Any]) -> serve.Application:
    """Return the application.

    Args:
        settings: Settings of `stu-serve`, with underscores: `model`, `replicas`, `max_running`, ..

    Raises UserError for a setting that is not allowed, or that Ray Serve's proxies have instead.
    """
    config = config_from({**settings, "ray": True})
    for name in OF_HTTP_SERVER:
        if name in settings:
            fix = "Ray Serve's proxies listen: set it in http_options, or leave it out"
            raise UserError(name, settings[name], fix=fix)
    engines, configs = {}, model_configs(config)
    require_cache_sizes(config, configs, {})
    for name, own in configs.items():
        deployment = NAME if name == config.name else f"{NAME}-{name}"
        arguments = _replicas_config(own), own.replicas, own.cluster, deployment
        with errors_of_model(config, name):
            engines[name] = engine_application(*arguments)
    return serve.deployment(HttpReplica, **HTTP_REPLICAS_OPTIONS).bind(dict(settings), engines)


@serve.ingress()
class HttpReplica:
    """A replica that answers clients.

    Args:
        settings: See `build`.
        engines: Handles of the deployments of engines, by the names of their models.
    """

    def __init__(self, settings: Mapping[str, Any], engines: Mapping[str, Any]) -> None:
        self._config = config_from({**settings, "ray": True})
        replicas = {
            name: handled_replicas(
                partial(engines.get, name),
                lambda waits: None,
                _replicas_config(own),
                own.replicas,
            )
            for name, own in model_configs(self._config).items()
        }
        self._service = make_service(self._config, replicas)

    def __serve_build_asgi_app__(self) -> Any:
        return asgi_app(self._config, self._service, Keys(self._config.api_keys))


def _replicas_config(config: ServerConfig) -> ReplicasConfig:
    return replicas_config(config, config.model, ("auto",), 1)
