"""Everything that the routes of the server work with."""

import asyncio
import json
import logging
import math
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import stu
from serve.openai.responses.store import ResponseStore
from serve.ray.cluster import engines_have_gpus
from serve.server.access.limits import RateLimits
from serve.server.batches.batches import Batches, Limits
from serve.server.batches.collector import BatchCollector
from serve.server.config import ServerConfig, errors_of_model, model_configs
from serve.server.model_version import engine_devices
from serve.server.operating.metrics import Metrics
from serve.server.operating.reload import ReloadInProgress
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.slices import Threads
from serve.server.served_model import ServedModel
from stu.common.errors import UserError, requires_extra, setting_name
from stu.common.machine import num_processors
from stu.common.text import Json

if TYPE_CHECKING:
    from serve.server.operating.tracing import Tracing

logger = logging.getLogger("stu")

ROWS_AHEAD = 1.5
"""Rows of batches to decode at once, as a multiple of the requests that engines decode together."""


@dataclass
class Service:
    """All served models, and what they share."""

    config: ServerConfig
    models: Sequence[ServedModel]
    """Models, the one of requests that name none first."""
    stored: ResponseStore
    metrics: Metrics
    batches: Batches | None = None
    """Files and batches, if there is a folder for them."""
    version: str = field(default_factory=lambda: stu.__version__)
    is_draining: bool = False
    """Whether the server is stopping and takes no more requests."""
    threads: Threads = field(default_factory=Threads)
    tracing: "Tracing | None" = None
    limits: RateLimits = field(init=False)

    def __post_init__(self) -> None:
        self.limits = RateLimits(self.config.requests_per_minute, self.config.tokens_per_minute)
        self._by_name = {name: model for model in self.models for name in model.names}

    @property
    def names(self) -> Sequence[str]:
        """Names of all models and adapters."""
        return list(self._by_name)

    def find(self, name: str | None) -> ServedModel:
        """Return the model that a body names, or that has the adapter that it names; the first if
        it names none. Raises UserError if there is none."""
        if name is None:
            return self.models[0]
        if (found := self._by_name.get(name)) is not None:
            return found
        allowed = f"{json.dumps(self.names[0])}, the only model here"
        if len(self.names) > 1:
            allowed = f"one of {', '.join(map(json.dumps, self.names))}"
        raise UserError("model", name, allowed, code="model_not_found")

    @property
    def num_replicas(self) -> int:
        """Number of replicas that there are to be."""
        return sum(len(model.replicas) for model in self.models)

    async def start(self) -> None:
        """Start the replicas of all models."""
        for model in self.models:
            await model.replicas.start()

    async def ready(self) -> None:
        """Wait until each model has a replica that takes requests, or the server stops.

        Raises OSError if a model has none that can be started.
        """
        for model in self.models:
            await model.replicas.ready(lambda: not self.is_draining)

    async def stop(self) -> None:
        """End every replica, and wait for it. What fails for a model is logged."""
        for model in self.models:
            await model.reloader.stop()
        ends = (model.replicas.stop() for model in self.models)
        results = await asyncio.gather(*ends, return_exceptions=True)
        for model, result in zip(self.models, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("replicas of %s have not ended", model.name, exc_info=result)

    def kill(self) -> None:
        """End every replica at once."""
        for model in self.models:
            model.replicas.kill()

    def give_up(self) -> None:
        """End every request, as the server stops."""
        for model in self.models:
            model.replicas.give_up()

    def reloading(self, name: str | None) -> Json:
        """Return the version of a model that takes new requests, and how far a reload is. Raises
        UserError."""
        model = self.find(name)
        return {"model": model.name, **model.reloader.description()}

    async def reload(self, name: str | None, path: Path | None, one_by_one: bool | None) -> Json:
        """Load another version of a model, and return as `Reloader.reload` does. One model is
        loaded at a time, as that looks whether memory has room, which it cannot while replicas
        load, as when the server starts. It does not look if `one_by_one` is given."""
        model = self.find(name)
        if any(other.reloader.is_loading for other in self.models):
            raise ReloadInProgress("another version is being loaded: wait until it is done")
        replicas = {other.name: other.replicas for other in self.models}
        looks = one_by_one is None
        loading = [o for o, of in replicas.items() if of.is_loading or (looks and of.num_loading)]
        if loading:
            message = f"replicas of {', '.join(loading)} are being loaded: "
            raise ReloadInProgress(
                f"{message}wait until /ready counts them as ready, or set one_by_one"
            )
        return {"model": model.name, **await model.reloader.reload(path, one_by_one)}


def make_service(config: ServerConfig, replicas: Mapping[str, Dispatcher] | None = None) -> Service:
    """Return the service of the models of a server; their replicas are not started yet.

    replicas: Replicas that another program runs, by the names of their models. None: those of the
    settings.

    Raises UserError.
    """
    configs, replicas = model_configs(config), replicas or {}
    devices = {}
    for name, own in {} if config.ray else configs.items():
        with errors_of_model(config, name):
            devices[name] = engine_devices(own)
    if not replicas:
        require_cache_sizes(config, configs, devices)
    num_ranks = sum(len(group.split(",")) for groups in devices.values() for group in groups)
    num_threads = max(1, num_processors() // max(1, num_ranks))
    metrics = Metrics(config.metric_prefix, list(configs))
    models = []
    for name, own in configs.items():
        with errors_of_model(config, name):
            models.append(ServedModel(own, metrics, num_threads, replicas.get(name)))
    batches = _batches(config, models)
    if batches is not None:
        metrics.register(BatchCollector(batches, metrics.common_name))
    return Service(
        config,
        models,
        _stored_responses(config),
        metrics,
        batches,
        tracing=_tracing(config.otlp_traces_endpoint),
    )


def require_cache_sizes(
    config: ServerConfig,
    configs: Mapping[str, ServerConfig],
    devices: Mapping[str, Sequence[str]],
) -> None:
    """Raise UserError if engines that share a device, or hosts of a Ray cluster, have no
    `cache_gib`.

    Args:
        config: Settings of the server.
        configs: Settings of each model.
        devices: Devices of the engines of each model on this machine.
    """
    engines = Counter(
        rank for groups in devices.values() for group in groups for rank in set(group.split(","))
    )
    for name, own in configs.items():
        if own.engine.cache_gib is not None:
            continue
        if own.ray:  # where Ray gives engines no GPUs, those of several models share hosts
            shares = len(configs) > 1 and not engines_have_gpus(own.cluster.gpus_per_replica)
        else:
            ranks = ",".join(devices[name]).split(",")
            shares = any(engines[rank] > 1 for rank in ranks)
        if shares:
            beside = f", or {setting_name('gpus_per_replica')} 1" if own.ray else ""
            message = "several replicas on a device would each take half of its free memory: give "
            with errors_of_model(config, name):
                raise UserError(
                    "cache_gib", message=f"{message}{setting_name('cache_gib')}{beside}"
                )


def _tracing(endpoint: str | None) -> "Tracing | None":
    if endpoint is None:
        return None
    with requires_extra("tracing"):
        from serve.server.operating.tracing import otlp_tracing

        return otlp_tracing(endpoint)


def _stored_responses(config: ServerConfig) -> ResponseStore:
    file = config.batch_dir and config.batch_dir / "responses.sqlite3"
    try:
        return ResponseStore(file, config.max_response_bytes)
    except sqlite3.Error as error:
        message = f"{setting_name('batch_dir')}: {file} cannot be used ({error})"
        raise UserError("batch_dir", message=message) from error


def _batches(config: ServerConfig, models: Sequence[ServedModel]) -> Batches | None:
    if config.batch_dir is None:
        return None
    limits = Limits(
        file_bytes=config.max_file_bytes,
        stored_bytes=config.max_stored_bytes,
        rows=config.max_batch_rows,
        line_bytes=config.max_body_bytes,
        rows_at_once={model.name: _rows_at_once(model) for model in models},
    )
    bases = {name: model.name for model in models for name in model.names}
    return Batches(config.batch_dir, limits, bases.get)


def _rows_at_once(model: ServedModel) -> int:
    return math.ceil(ROWS_AHEAD * model.config.engine.max_running) * len(model.replicas)
