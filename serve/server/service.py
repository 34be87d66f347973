"""Everything that the routes of the server work with."""

import asyncio
import json
import math
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stu
from serve.adapters.folder import read_adapter
from serve.devices import device_groups, repeat_a_device
from serve.openai.chat import ChatCompletions
from serve.openai.completions import DEFAULTS, TextCompletions
from serve.openai.embeddings import Embeddings
from serve.openai.responses.endpoint import Responses
from serve.openai.responses.store import ResponseStore
from serve.openai.text_scores import TextScores
from serve.prompts import RequestBuilder
from serve.sampling.grammar import Grammars
from serve.server.access.limits import RateLimits
from serve.server.batches.batches import Batches, Limits
from serve.server.batches.collector import BatchCollector
from serve.server.config import ServerConfig
from serve.server.metrics import Metrics
from serve.server.operating.reload import Reloader
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.slices import Threads
from serve.server.replicas.stream import Busy, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.replicas.versions import Versions
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError, requires_extra, setting_name
from stu.common.processes import num_processors
from stu.config import ModelConfig
from stu.division.parts import check_divides_channels
from stu.model_dir import load_config, load_generation, load_tokenizer
from stu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.server.operating.tracing import Tracing

IDLE_SECONDS = 0.05
"""Time between looks whether a version has requests left."""
ROWS_AHEAD = 1.5
"""Rows of batches to decode at once, as a multiple of the requests that engines decode together."""


@dataclass
class ServedModel:
    """A version of the served model, and all that its requests need."""

    path: Path
    """Model directory."""
    version: int
    """1 for the first, and one more for each that is loaded later."""
    model: ModelConfig
    tokenizer: Tokenizer
    completions: TextCompletions
    chats: ChatCompletions
    embeddings: Embeddings
    text_scores: TextScores
    responses: Responses
    grammars: Grammars
    replicas: Dispatcher
    loaded: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""
    num_entering: int = 0
    """Requests that have come, and may not have begun."""

    async def idle(self) -> None:
        """Wait until no request is left."""
        while self.num_entering or not self.replicas.is_idle:
            await asyncio.sleep(IDLE_SECONDS)


@dataclass
class Service:
    """A served model."""

    config: ServerConfig
    current: ServedModel
    """Version that takes new requests."""
    stored: ResponseStore
    replicas: Versions
    metrics: Metrics
    batches: Batches | None = None
    """Files and batches, if there is a folder for them."""
    version: str = field(default_factory=lambda: stu.__version__)
    is_draining: bool = False
    """Whether the server is stopping and takes no more requests."""
    threads: Threads = field(default_factory=Threads)
    tracing: "Tracing | None" = None
    limits: RateLimits = field(init=False)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether requests may enter. Otherwise they wait, as the only replica is exchanged."""
    reloader: "Reloader[ServedModel]" = field(init=False)
    _num_at_door: int = 0

    def __post_init__(self) -> None:
        self.limits = RateLimits(self.config.requests_per_minute, self.config.tokens_per_minute)
        self.is_open.set()
        self.reloader = Reloader(self)

    @asynccontextmanager
    async def entered(self, is_background: bool = False) -> AsyncIterator[ServedModel]:
        """Return the version for a new request, which does not end before the block has.

        is_background: Whether the request takes no place of `--max-waiting` and has no time limit.

        Raises Busy or Unavailable.
        """
        if is_background:
            await self.is_open.wait()
        elif not self.is_open.is_set():
            await self._wait_at_door()
        served = self.current
        served.num_entering += 1
        try:
            yield served
        finally:
            served.num_entering -= 1

    async def _wait_at_door(self) -> None:
        if self._num_at_door >= self.config.max_waiting:
            raise Busy(f"{self._num_at_door} requests wait for another version: try again later")
        self._num_at_door += 1
        try:
            await asyncio.wait_for(self.is_open.wait(), self.config.request_timeout_seconds)
        except asyncio.TimeoutError as error:
            raise Unavailable("another version of the model is being loaded") from error
        finally:
            self._num_at_door -= 1

    def next_version(self, path: Path) -> ServedModel:
        """Return another version of the model, whose replicas are not started yet. Raises
        UserError."""
        return _served(self.config, path, self.current.version + 1)

    def switch(self, served: ServedModel) -> None:
        """Let another version take all new requests."""
        self.current, self.replicas.current = served, served.replicas
        self.is_open.set()

    def require_served(self, model: str | None) -> None:
        """Raise UserError if a body asks for another model."""
        adapters = self.config.adapters
        if model not in (None, self.config.name, *adapters):
            allowed = f"{json.dumps(self.config.name)}, the only model here"
            if adapters:
                allowed = f"one of {', '.join(map(json.dumps, [self.config.name, *adapters]))}"
            raise UserError("model", model, allowed, code="model_not_found")


def make_service(config: ServerConfig, replicas: Dispatcher | None = None) -> Service:
    """Return the service of a model directory; its replicas are not started yet.

    replicas: Replicas that another program runs. None: those of the settings."""
    served = _served(config, config.model, 1, replicas)
    versions = Versions(served.replicas)
    metrics = Metrics(versions, config.metric_prefix, config.name)
    batches = _batches(config, len(versions))
    if batches is not None:
        metrics.register(BatchCollector(batches, config.name))
    return Service(
        config,
        served,
        _stored_responses(config),
        versions,
        metrics,
        batches,
        tracing=_tracing(config.otlp_traces_endpoint),
    )


def _served(
    config: ServerConfig, path: Path, version: int, replicas: Dispatcher | None = None
) -> ServedModel:
    """Return a version of the model. Raises UserError."""
    model, tokenizer = load_config(path), load_tokenizer(path)
    adapters = config.adapters
    for name, folder in adapters.items():
        read_adapter(name, folder, model)  # now, and not when replicas start
    if adapters and config.tensor_parallel > 1:
        allowed = "1 with --lora-modules, as adapters are not divided"
        raise UserError("tensor_parallel", config.tensor_parallel, allowed)
    check_divides_channels(model, config.tensor_parallel)
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "model_name": config.name,
        "max_seq_len": model.max_seq_len,
        # With more choices than may wait, a request could never be queued, only retried for ever.
        "max_choices": min(config.max_choices, config.max_waiting),
    }
    of_completions = {
        "builder": RequestBuilder(tokenizer, DEFAULTS),
        "json_whitespace": config.json_whitespace,
        **common,
    }
    chat_tokens = load_generation(path)["max_new_tokens"]
    template = ChatTemplate(path, tokenizer)
    chats = ChatCompletions(template, chat_tokens, **of_completions)
    return ServedModel(
        path,
        version,
        model,
        tokenizer,
        TextCompletions(**of_completions),
        chats,
        Embeddings(model.width, **common),
        TextScores(**common),
        Responses(chats, **common),
        Grammars(tokenizer),
        replicas or _replicas(config, path),
    )


def _replicas(config: ServerConfig, path: Path) -> Dispatcher:
    if config.ray:
        with requires_extra("ray"):
            from serve.ray.deployment import deployed_replicas

        settings = replicas_config(config, path, ("auto",), 1)
        return deployed_replicas(f"stu-{config.name}", settings, config.replicas, config.cluster)
    devices = device_groups(config.devices, config.tensor_parallel) * config.replicas
    if repeat_a_device(devices) and config.engine.cache_gib is None:
        raise UserError(
            "cache_gib",
            message="several replicas on a device would each take half of its free memory: give "
            f"{setting_name('cache_gib')}",
        )
    num_threads = max(1, num_processors() // (len(devices) * config.tensor_parallel))
    return Replicas(replicas_config(config, path, tuple(devices), num_threads))


def replicas_config(
    config: ServerConfig, path: Path, devices: tuple[str, ...], num_threads: int
) -> ReplicasConfig:
    """Return the settings of replicas of the model in a folder, on these devices."""
    return ReplicasConfig(
        path,
        devices,
        num_threads,
        config.dtype,
        config.engine,
        config.watchdog_seconds,
        config.max_waiting,
        config.adapters,
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


def _batches(config: ServerConfig, num_replicas: int) -> Batches | None:
    if config.batch_dir is None:
        return None
    limits = Limits(
        file_bytes=config.max_file_bytes,
        stored_bytes=config.max_stored_bytes,
        rows=config.max_batch_rows,
        line_bytes=config.max_body_bytes,
        rows_at_once=math.ceil(ROWS_AHEAD * config.engine.max_running) * num_replicas,
    )
    return Batches(config.batch_dir, limits)
