"""All connections of clients, within a limit.

The limit follows from the limit of open files, some of which are reserved for replicas and files.
When it is reached, the connection that has been idle for longest is closed for a new one. When none
is idle, only /health is still answered.
"""

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import time
from collections.abc import Callable, Sequence

import psutil
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.openai.errors import error_body
from serve.server.connection import Connection, Deadlines
from serve.server.exchange import Exchanges, answer, exchange_of
from stu.common.errors import UserError

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.5
HANDSHAKE_SECONDS = 10.0
ACCEPTS_AT_ONCE = 64
ACCEPT_PAUSE_SECONDS = 0.5
SPARE = 16
"""Connections above the limit, on which only /health is answered."""
FILES_KEPT = 32
FILES_OF_A_REPLICA = 8
"""Open files of a replica: its socket and output, and pipes while it starts."""
FEWEST, MOST = 16, 8192
"""Bounds of the limit. The upper one bounds memory: an idle connection takes about 50 KB."""
MOST_FILES = 2**16
"""Limit of open files to set where the system has none."""


def connection_limit(num_replicas: int, num_uploads: int = 0) -> int:
    """Raise the limit of open files as far as the system allows, and return the number of
    connections for it beside the files of replicas and uploads. Raises UserError if it is too
    small to serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft == resource.RLIM_INFINITY:
        soft = MOST_FILES
    kept = FILES_KEPT + FILES_OF_A_REPLICA * num_replicas + psutil.Process().num_fds()
    left = soft - kept - num_uploads - SPARE
    if left < FEWEST:
        raise UserError(
            "ulimit",
            message=f"the limit of {soft} open files leaves {max(0, left)} connections, and "
            f"{FEWEST} are needed: raise it (ulimit -n, or LimitNOFILE of a systemd unit)",
        )
    return min(int(left), MOST)


class Connections:
    """All connections.

    Args:
        most: Limit of connections at once.
        deadlines: Times that clients may take.
        count_refused: Called with the status of each request that is refused here.
        context: What new connections use for TLS. None: they have none.
    """

    def __init__(
        self,
        most: int,
        deadlines: Deadlines,
        count_refused: Callable[[int], None] = lambda status: None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.deadlines, self.context, self.count_refused = deadlines, context, count_refused
        self._most = most
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._busy: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        """Connections that wait for a request, the one that has waited longest first."""
        self._sending: dict[Connection, None] = {}
        """Connections that send a body, the one that began first."""
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self._handshakes) + len(self._busy) + len(self._idle) + len(self._sending)

    def listen(self, sockets: Sequence[socket.socket], make: Callable[[], Connection]) -> None:
        """Accept connections on sockets that listen. `make` returns a new connection."""
        for listener in sockets:
            listener.setblocking(False)
            self._tasks.append(asyncio.create_task(self._accept(listener, make)))
        self._tasks.append(asyncio.create_task(self._sweep()))

    async def stop_accepting(self) -> None:
        """Accept no more connections; deadlines still apply. The sockets may be closed then."""
        for task in self._tasks[:-1]:
            task.cancel()
        await asyncio.gather(*self._tasks[:-1], return_exceptions=True)

    def note(self, connection: Connection) -> None:
        """Note that a connection has entered another phase."""
        self.forget(connection)
        if connection.opener is not None:
            self._handshakes.pop(connection.opener, None)
        groups = {"headers": self._idle, "idle": self._idle, "body": self._sending}
        groups.get(connection.phase, self._busy)[connection] = None

    def forget(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        for group in (self._busy, self._idle, self._sending):
            group.pop(connection, None)

    async def _accept(self, listener: socket.socket, make: Callable[[], Connection]) -> None:
        loop = asyncio.get_running_loop()
        num_accepted = 0
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor or no memory is left
                logger.error("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            num_accepted += 1
            if self._make_room() or num_accepted % ACCEPTS_AT_ONCE == 0:
                await asyncio.sleep(0)  # lets sockets close, and other tasks run
            if len(self) >= self._most + SPARE:
                logger.warning("a connection was refused: %d others are busy", self._most)
                accepted.close()
                continue
            is_crowded = len(self) >= self._most
            task = asyncio.create_task(self._connect(accepted, make, is_crowded))
            self._handshakes[task] = None
            task.add_done_callback(lambda done: self._handshakes.pop(done, None))

    async def _connect(
        self,
        accepted: socket.socket,
        make: Callable[[], Connection],
        is_crowded: bool,
    ) -> None:
        def made() -> Connection:
            connection = make()
            if is_crowded:
                connection.app = health_alone(connection.app, self.count_refused)
            return connection

        context = self.context
        timeout = {} if context is None else {"ssl_handshake_timeout": HANDSHAKE_SECONDS}
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the client went away, or does not speak TLS
            await loop.connect_accepted_socket(made, accepted, ssl=context, **timeout)

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest if there are too many."""
        if len(self) < self._most:
            return False
        for group in (self._idle, self._sending):
            for connection in group:
                logger.warning(
                    "the longest idle connection was closed: there are %d connections", self._most
                )
                self.forget(connection)
                connection.transport.abort()
                return True
        task = next(iter(self._handshakes), None)
        if task is None:
            return False
        del self._handshakes[task]
        task.cancel()
        return True

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for connection in [*self._busy, *self._idle, *self._sending]:
                _check(connection, now)


def _check(connection: Connection, now: float) -> None:
    """End a connection whose deadline is over, or that fails: others keep their deadlines."""
    try:
        connection.check(now)
    except Exception:
        logger.exception("a connection was cut off because it failed")
        connection.transport.abort()


def health_alone(app: ASGIApp, count_refused: Callable[[int], None] | None = None) -> ASGIApp:
    """Return an application that refuses everything except /health."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        body = error_body("too many connections: try again later", "server_error")
        exchange_of(scope).refuse(body)
        await answer(send, 503, body, {"retry-after": "1"})

    def count(status: int, model: str) -> None:
        if count_refused is not None:
            count_refused(status)

    refusing = Exchanges(refuse, log_texts=False, count=count)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["path"] == "/health" else refusing)(scope, receive, send)

    return answered
