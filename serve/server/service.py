"""Everything that the routes of the server work with."""

import json
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import stu
from serve.devices import choose_devices
from serve.openai.chat import ChatCompletions
from serve.openai.completions import DEFAULTS, TextCompletions
from serve.openai.embeddings import Embeddings
from serve.openai.responses.endpoint import Responses
from serve.openai.responses.store import ResponseStore
from serve.prompts import RequestBuilder
from serve.sampling.grammar import Grammars
from serve.server.access.limits import RateLimits
from serve.server.batches.batches import Batches, Limits
from serve.server.batches.collector import BatchCollector
from serve.server.config import ServerConfig
from serve.server.metrics import Metrics
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.slices import Threads
from serve.server.replicas.supervisor import ReplicasConfig
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError, requires_extra, setting_name
from stu.common.processes import num_processors
from stu.config import ModelConfig
from stu.model_dir import load_config, load_generation, load_tokenizer
from stu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.server.operating.tracing import Tracing

ROWS_AHEAD = 1.5
"""Rows of batches to decode at once, as a multiple of the requests that engines decode together."""


@dataclass
class Service:
    """A served model."""

    config: ServerConfig
    model: ModelConfig
    tokenizer: Tokenizer
    completions: TextCompletions
    chats: ChatCompletions
    embeddings: Embeddings
    responses: Responses
    stored: ResponseStore
    grammars: Grammars
    replicas: Replicas
    metrics: Metrics
    batches: Batches | None = None
    """Files and batches, if there is a folder for them."""
    version: str = field(default_factory=lambda: stu.__version__)
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""
    is_draining: bool = False
    """Whether the server is stopping and takes no more requests."""
    threads: Threads = field(default_factory=Threads)
    tracing: "Tracing | None" = None
    limits: RateLimits = field(init=False)

    def __post_init__(self) -> None:
        self.limits = RateLimits(self.config.requests_per_minute, self.config.tokens_per_minute)

    def require_served(self, model: str | None) -> None:
        """Raise UserError if a body asks for another model."""
        if model not in (None, self.config.name):
            allowed = f"{json.dumps(self.config.name)}, the only model here"
            raise UserError("model", model, allowed, code="model_not_found")


def make_service(config: ServerConfig) -> Service:
    """Return the service of a model directory; its replicas are not started yet."""
    model, tokenizer = load_config(config.model), load_tokenizer(config.model)
    devices = choose_devices(config.devices) * config.replicas
    if len(set(devices)) < len(devices) and config.engine.cache_gib is None:
        raise UserError(
            "cache_gib",
            message="several replicas on a device would each take half of its free memory: give "
            f"{setting_name('cache_gib')}",
        )
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
    chat_tokens = load_generation(config.model)["max_new_tokens"]
    template = ChatTemplate(config.model, tokenizer)
    replicas = Replicas(
        ReplicasConfig(
            config.model,
            tuple(devices),
            max(1, num_processors() // len(devices)),
            config.dtype,
            config.engine,
            config.watchdog_seconds,
            config.max_waiting,
        )
    )
    chats = ChatCompletions(template, chat_tokens, **of_completions)
    metrics = Metrics(replicas, config.metric_prefix, config.name)
    batches = _batches(config, len(devices))
    if batches is not None:
        metrics.register(BatchCollector(batches, config.name))
    file = config.batch_dir and config.batch_dir / "responses.sqlite3"
    return Service(
        config,
        model,
        tokenizer,
        TextCompletions(**of_completions),
        chats,
        Embeddings(model.width, **common),
        Responses(chats, **common),
        ResponseStore(file, config.max_response_bytes),
        Grammars(tokenizer),
        replicas,
        metrics,
        batches,
        tracing=_tracing(config.otlp_traces_endpoint),
    )


def _tracing(endpoint: str | None) -> "Tracing | None":
    if endpoint is None:
        return None
    with requires_extra("tracing"):
        from serve.server.operating.tracing import otlp_tracing

        return otlp_tracing(endpoint)


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
