"""A version of a served model: everything that is read from its model directory."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.adapters.folder import read_adapter
from serve.devices import device_groups
from serve.openai.chat import ChatCompletions
from serve.openai.completions import DEFAULTS, TextCompletions
from serve.openai.embeddings import Embeddings
from serve.openai.responses.endpoint import Responses
from serve.openai.text_scores import TextScores
from serve.prompts import RequestBuilder, default_params
from serve.sampling.grammar import Grammars
from serve.server.config import ServerConfig
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.supervisor import ReplicasConfig
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError, requires_extra
from stu.config import ModelConfig
from stu.division.parts import check_divides_channels
from stu.model_dir import load_config, load_tokenizer
from stu.tokenizer import Tokenizer

IDLE_SECONDS = 0.05
"""Time between looks whether a version has requests left."""


@dataclass
class ModelVersion:
    """A version of a served model, and all that its requests need."""

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


def make_version(
    config: ServerConfig,
    path: Path,
    version: int,
    num_threads: int,
    replicas: Dispatcher | None = None,
) -> ModelVersion:
    """Return a version of a model, whose replicas are not started yet.

    Args:
        config: Settings of the model.
        path: Model directory.
        version: Number of the version.
        num_threads: Threads that an engine computes with on a CPU.
        replicas: Replicas that another program runs. None: those of the settings.

    Raises UserError.
    """
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
    chat_tokens = default_params(path, tokenizer).max_new_tokens
    template = ChatTemplate(path, tokenizer)
    chats = ChatCompletions(template, chat_tokens, **of_completions)
    return ModelVersion(
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
        replicas or _replicas(config, path, num_threads),
    )


def _replicas(config: ServerConfig, path: Path, num_threads: int) -> Dispatcher:
    if config.ray:
        with requires_extra("ray"):
            from serve.ray.deployment import deployed_replicas

        settings = replicas_config(config, path, ("auto",), 1)
        return deployed_replicas(f"stu-{config.name}", settings, config.replicas, config.cluster)
    return Replicas(replicas_config(config, path, tuple(engine_devices(config)), num_threads))


def engine_devices(config: ServerConfig) -> list[str]:
    """Return the device of each engine of a model on this machine, with commas between those of
    the ranks that divide it. Raises UserError."""
    return device_groups(config.devices, config.tensor_parallel) * config.replicas


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
        config.name,
    )
