"""`stu-serve`: an OpenAI-compatible HTTP server over the engines of a host."""

import asyncio
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from serve.config import EngineConfig
from serve.server.config import ServerConfig
from serve.server.listening import is_reached_from_outside, listening, url_of
from serve.server.repeats import Repeats
from stu.common.cli import ArgumentParser, run_command
from stu.common.processes import ignore_hangups
from stu.common.text import json_line

# torch and the HTTP stack take seconds to import: only a valid command line pays for them.
if TYPE_CHECKING:
    from serve.server.app import Service

logger = logging.getLogger("stu")

KEEP_ALIVE_SECONDS = 75
SWITCH_SECONDS = 0.001
"""Longest time that another thread keeps the event loop waiting, for Python's own code."""
LAST_WORDS_SECONDS = 3
"""For the answers of requests that did not end while the server drained."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: stopped when asked to; 2: it could not start."""
    return run_command("stu-serve", lambda: serve(_parse(argv)), "serve")


def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT; then requests that run may end, and no other begins.

    Raises ValueError or OSError for what cannot be served.
    """
    repeats = _log_as_json()
    ignore_hangups()
    keys = config.keys()
    with listening(config) as sockets:
        if not keys and any(map(is_reached_from_outside, sockets)):
            logger.warning(
                "host=%s without API keys: whoever reaches this machine may use the server; give "
                "api_keys or STU_API_KEYS",
                config.host,
            )
        return _serve(config, keys, sockets, repeats)


def _serve(
    config: ServerConfig, keys: Sequence[str], sockets: Sequence[socket.socket], repeats: Repeats
) -> int:
    service = _service(config)

    import uvicorn

    from serve.server.app import make_app
    from serve.server.connection import Connection, Deadlines
    from serve.server.connections import Connections, connection_limit
    from serve.server.exchange import Exchanges
    from serve.server.guard import MAX_HEADER_BYTES, Guard

    app = make_app(service)
    app.router.lifespan_context = _lifespan(service)
    guarded: Any = Guard(app, keys, config.max_body_bytes)
    origins = [origin.strip() for origin in config.cors_origins.split(",") if origin.strip()]
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        # Outside: a browser asks without a key whether it may send one.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    settings = uvicorn.Config(
        Exchanges(guarded, config.log_prompts, service.metrics.count_refused),
        # Whoever may write to a Unix socket is trusted to say whom it asks for.
        forwarded_allow_ips="*" if config.uds is not None else None,
        log_config=None,
        access_log=True,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http="h11",
        ws="none",  # where a library for them is installed, they would have no deadline and no key
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)) + LAST_WORDS_SECONDS,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )

    connections = Connections(
        connection_limit(len(service.replicas)),
        Deadlines(
            config.header_timeout_seconds,
            config.body_timeout_seconds,
            config.request_timeout_seconds,
        ),
        service.metrics.count_refused,
    )

    class Server(uvicorn.Server):
        """One that says when it is ready, and stops at once when it is asked twice."""

        failure: OSError | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                service.replicas.kill()
                os._exit(128 + sig)
            service.is_draining = True
            self.should_exit = True
            asyncio.get_running_loop().call_later(config.drain_seconds, service.replicas.give_up)

        def connection(self) -> Connection:
            return Connection(
                connections,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        async def shutdown(self, sockets: Any = None) -> None:
            await connections.stop_accepting()
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            repeats.report()
            return await super().on_tick(counter)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup([])  # it would accept connections without a limit
            connections.listen(sockets, self.connection, settings.ssl)
            self._url = url_of(sockets[0], config.tls_key is not None)
            logger.info("the model is being loaded; until then %s answers 503", self._url)
            self._loading = asyncio.create_task(self._load())

        async def _load(self) -> None:
            try:
                await service.replicas.ready(lambda: not service.is_draining)
            except OSError as error:
                self.failure, self.should_exit = error, True
                return
            if not service.is_draining:
                logger.info("listening on %s", self._url)

    server = Server(settings)
    asyncio.run(server.serve(list(sockets)))
    if server.failure is not None:
        raise server.failure
    return 0


def _service(config: ServerConfig) -> "Service":
    from importlib.metadata import version

    from serve.devices import choose_devices
    from serve.openai.chat import ChatTemplate
    from serve.openai.completions import DEFAULTS, Completions
    from serve.prompts import RequestBuilder
    from serve.sampling.grammar import Grammars
    from serve.server.app import Service
    from serve.server.metrics import Metrics
    from serve.server.replicas.dispatch import Replicas
    from stu.common.processes import num_processors
    from stu.model_dir import load_config, load_generation, load_tokenizer

    model, tokenizer = load_config(config.model), load_tokenizer(config.model)
    generation = load_generation(config.model)
    devices = choose_devices(config.devices) * config.replicas
    if len(set(devices)) < len(devices) and config.engine.cache_gib is None:
        raise ValueError(
            "several engines on one device would each take half of its free memory: give cache_gib"
        )
    builder = RequestBuilder(tokenizer, DEFAULTS)
    replicas = Replicas(config, devices, max(1, num_processors() // len(devices)))
    return Service(
        config,
        replicas,
        Metrics(replicas, config.metric_prefix, config.name),
        tokenizer,
        Completions(builder, tokenizer, config.name, config.json_whitespace),
        ChatTemplate(config.model, tokenizer),
        Grammars(tokenizer),
        version("stu"),
        model,
        generation["max_new_tokens"],
        started=int(time.time()),
    )


def _lifespan(service: "Service") -> Any:
    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()  # or streams would wait for collections of all that was imported
        await service.replicas.start()
        try:
            yield
        finally:
            await service.replicas.stop()

    return lifespan


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json_line(line)


def _log_as_json() -> Repeats:
    handler, repeats = logging.StreamHandler(sys.stderr), Repeats()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(repeats)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return repeats


def _parse(argv: Sequence[str] | None) -> ServerConfig:
    parser = ArgumentParser(
        prog="stu-serve",
        description="Serve the model of a model directory to OpenAI's clients, at /v1/completions "
        "and /v1/chat/completions, and a page to try it at /. SIGTERM: no request begins any more, "
        "those that run may end; a second one ends all.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder of stu-export")
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_settings(ServerConfig)
    given = parser.parse_args(argv).as_dict()
    del given["config"]
    engine = {its.name: given.pop(its.name) for its in fields(EngineConfig)}
    return ServerConfig(**given, engine=EngineConfig(**engine))


if __name__ == "__main__":
    sys.exit(main())
