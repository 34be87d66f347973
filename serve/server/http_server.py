"""The HTTP server: uvicorn with the application, its middleware and bounded connections."""

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from serve.server.access.keys import Keys
from serve.server.app import make_app, row_answering
from serve.server.batches.decoding import Answering
from serve.server.batches.files import MOST_UPLOADS
from serve.server.config import ServerConfig
from serve.server.connection import Connection, Deadlines
from serve.server.connections import Connections, connection_limit
from serve.server.exchange import LOCAL, Exchanges
from serve.server.guard import MAX_HEADER_BYTES, Guard
from serve.server.listening import tls_context, url_of
from serve.server.service import Service, make_service
from stu.common.errors import UserError
from stu.common.processes import Hangups

logger = logging.getLogger("stu")

KEEP_ALIVE_SECONDS = 75
SWITCH_SECONDS = 0.001
"""Time after which Python code in another thread gives way to the event loop."""
LAST_ANSWERS_SECONDS = 3
"""Time for the answers to requests that did not end while the server drained."""


def run_server(
    config: ServerConfig,
    keys: Keys,
    sockets: Sequence[socket.socket],
    hangups: Hangups,
    on_tick: Callable[[], None],
) -> None:
    """Serve at `sockets` until a signal stops the server.

    Args:
        config: Settings of the server.
        keys: API keys, none if requests need no key.
        sockets: Sockets that listen.
        hangups: SIGHUP, at which keys and certificate are read again.
        on_tick: Called a few times a second.

    Raises:
        OSError: No replica can be started.
    """
    server = HttpServer(config, make_service(config), keys, hangups, on_tick)
    asyncio.run(server.serve(list(sockets)))
    if server.failure is not None:
        raise server.failure


class HttpServer(uvicorn.Server):
    """A server that answers 503 until a replica is ready, and drains when it is asked to stop."""

    def __init__(
        self,
        config: ServerConfig,
        service: Service,
        keys: Keys,
        hangups: Hangups,
        on_tick: Callable[[], None],
    ) -> None:
        self._service, self._on_tick = service, on_tick
        self._config, self._keys, self._hangups = config, keys, hangups
        self._drain_seconds, self._is_tls = config.drain_seconds, config.tls_key is not None
        deadlines = Deadlines(
            config.header_timeout_seconds,
            config.body_timeout_seconds,
            config.request_timeout_seconds,
            config.max_file_bytes / config.max_body_bytes,
        )
        most, count_refused = (
            connection_limit(
                2 * service.num_replicas, 0 if service.batches is None else MOST_UPLOADS
            ),
            service.metrics.count_refused,
        )
        self._connections = Connections(most, deadlines, count_refused, tls_context(config))
        self.failure: OSError | None = None
        """Why no replica could be started."""
        super().__init__(
            uvicorn.Config(
                asgi_app(config, service, keys),
                forwarded_allow_ips=trusted_proxies(),
                log_config=None,
                access_log=True,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                http="h11",
                ws="none",  # web sockets would have neither deadlines nor keys
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=max(1, round(config.drain_seconds))
                + LAST_ANSWERS_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; end everything at the second."""
        if self.should_exit:
            try:
                self._service.kill()
            finally:
                os._exit(128 + sig)
        self._service.is_draining = True
        self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.call_later(self._drain_seconds, self._service.give_up)

    async def startup(self, sockets: Any = None) -> None:
        """Accept connections, and load the model meanwhile."""
        await super().startup([])  # uvicorn would accept connections without a limit
        self._connections.listen(sockets, self._connection)
        self._url = url_of(sockets[0], self._is_tls)
        logger.info("loading the model; until then %s answers 503", self._url)
        self._loading = asyncio.create_task(self._load())

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop accepting connections, and wait for the last answers."""
        await self._connections.stop_accepting()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Run the periodic callback, and what SIGHUP asks for; return whether the server stops."""
        self._on_tick()
        if self._hangups.take():
            self._read_again()
        return await super().on_tick(counter)

    def _read_again(self) -> None:
        """Use the keys and the certificate that the files have now. What cannot be used is logged,
        and the old one stays."""
        path, certificate = self._keys.path, self._config.tls_certificate
        if path is None and certificate is None:
            logger.warning(
                "SIGHUP is ignored: there is no file of --api-keys or --tls-certificate to read "
                "again; send SIGTERM to stop"
            )
        if path is not None:
            try:
                self._keys.read()
            except (UserError, OSError) as error:
                logger.error("the old API keys stay valid: %s", error)
            else:
                logger.info("%d API keys were read from %s", len(self._keys), path)
        if certificate is not None:
            try:
                self._connections.context = tls_context(self._config)
            except OSError as error:
                logger.error("the old certificate stays in use: %s", error)
            else:
                logger.info("the certificate was read from %s", certificate)

    async def _load(self) -> None:
        try:
            await self._service.ready()
        except OSError as error:
            self.failure, self.should_exit = error, True
            return
        if not self._service.is_draining:
            logger.info("listening on %s", self._url)

    def _connection(self) -> Connection:
        return Connection(
            self._connections,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def trusted_proxies() -> str:
    """Return the addresses of proxies that are trusted to name the client, as uvicorn takes them.
    The client is the last one named that is no such proxy: what is before it, anybody may write."""
    others = os.environ.get("FORWARDED_ALLOW_IPS", LOCAL)
    return others if others == "*" else f"{LOCAL},127.0.0.1,::1,{others}"


def asgi_app(config: ServerConfig, service: Service, keys: Keys) -> ASGIApp:
    """Return the application with its middleware."""
    routes = make_app(service)
    routes.router.lifespan_context = _lifespan(service, row_answering(routes, keys))
    app: ASGIApp = Guard(routes, keys, config.max_body_bytes, config.max_file_bytes)
    origins = [origin.strip() for origin in config.cors_origins.split(",") if origin.strip()]
    if origins:
        # Outside of the guard: a browser asks without a key whether it may send one.
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return Exchanges(app, config.log_prompts, service.metrics.count_refused)


def _lifespan(service: Service, answering: Answering) -> Any:
    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()  # or collections of all imported modules would hold up streams
        await service.start()
        if service.batches is not None:
            await service.batches.start(answering)
        try:
            yield
        finally:
            if service.batches is not None:
                await service.batches.stop()
            await service.stop()
            if service.tracing is not None:
                await asyncio.to_thread(service.tracing.close)

    return lifespan
