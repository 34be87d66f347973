"""ASGI middleware around all others, which gives every request an id and logs every refusal.

A client's own `X-Request-Id` is used if it is short and printable, and sent back, so that a line of
this log can be found from the log of a gateway or a client.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai.errors import error_body
from serve.server.access.keys import Key

logger = logging.getLogger(__name__)

DISCARD_SECONDS, DISCARD_BYTES = 10.0, 2**26
"""Limits of what is still read of a refused body."""
FAULT = "the server failed; its log has the reason under the id in the header x-request-id"
TRACE_HEADERS = b"traceparent", b"tracestate"
LOCAL = "local"
"""Address of a client at a Unix socket that no proxy names."""
MOST_ID_CHARACTERS = 128
MOST_PATH_CHARACTERS = 200
CLIENT_ID = re.compile(rf"[!-~]{{1,{MOST_ID_CHARACTERS}}}")
"""Printable ASCII without spaces."""


@dataclass
class Exchange:
    """A request, as the log and the queue know it."""

    request_id: str
    client: str = ""
    """Address of the client, or the name of its key. Clients take turns."""
    key: Key | None = None
    """API key of the request, if it has a valid one."""
    trace_context: dict[str, str] = field(default_factory=dict)
    """Headers that name the trace of the request."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the answer about the limits of the client."""
    owner: str = ""
    """Digest of the client's key, which owns what the server stores; empty without a key."""
    model: str = ""
    """Name of the model, once it is known."""
    is_background: bool = False
    """Whether all other requests go first and no time limit applies, as for rows of batches."""
    reason: str = ""
    """Message of the answer if the request was refused."""
    logged_reason: str = ""
    """The same without what the client wrote."""
    param: str | None = None
    code: str | None = None
    """OpenAI's names of the field and of the error."""
    cut_off_if_stalled: Callable[[str], bool] = lambda reason: True
    """Closes the connection at once if its client takes nothing, logs the reason, and returns
    whether it did so."""

    def refuse(self, body: Any, logged_reason: str | None = None) -> None:
        """Remember the body of an error answer for the log. `logged_reason` is its message without
        what the client wrote."""
        error = body["error"]
        self.reason, self.param, self.code = error["message"], error["param"], error["code"]
        self.logged_reason = self.reason if logged_reason is None else logged_reason


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """Return the exchange of a request's ASGI scope."""
    found: Exchange = scope["stu.exchange"]
    return found


def has_file(scope: Mapping[str, Any]) -> bool:
    """Return whether a request sends or takes a whole file, which takes longer than others."""
    path: str = scope["path"]
    return path == "/v1/files" or (path.startswith("/v1/files/") and path.endswith("/content"))


class Exchanges:
    """The middleware.

    Args:
        app: The application inside.
        log_texts: Whether the log may have what clients wrote.
        count: Called with the status of each refusal and the name of the model, if it is known.
    """

    def __init__(
        self, app: ASGIApp, log_texts: bool, count: Callable[[int, str], None] | None = None
    ) -> None:
        self._app, self._log_texts, self._count = app, log_texts, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, even if the application fails."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else LOCAL
        exchange = Exchange(request_id(scope["headers"]), address)
        exchange.trace_context = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in TRACE_HEADERS
        }
        state = scope.get("state", {})  # of serve.server.connection
        exchange.cut_off_if_stalled = state.get("cut_off_if_stalled", exchange.cut_off_if_stalled)
        status, began = 0, time.monotonic()
        is_read = False

        async def receive_noted() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {**exchange.headers, "x-request-id": exchange.request_id}
                more = [(name.encode(), value.encode()) for name, value in own.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            elif status >= 400 and not message.get("more_body", False) and not is_read:
                # A socket that is closed with unread bytes resets the connection, and its client
                # sees no answer.
                await send({**message, "more_body": True})
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_discard(receive_noted), DISCARD_SECONDS)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        # HEAD is answered like GET; the HTTP server leaves the body out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        inner = {**scope, "method": method, "stu.exchange": exchange}
        try:
            await self._app(inner, receive_noted, send_with_id)
        except Exception:
            fields = {"request_id": exchange.request_id}
            logger.exception("a request failed", extra={"fields": fields})
            if status == 0:
                body = error_body(FAULT, "server_error")
                exchange.refuse(body)
                await answer(send_with_id, 500, body, {})
        # serve.server.connection logs and counts what it refuses itself.
        if status >= 400 and not state.get("is_refused"):
            if self._count is not None:
                self._count(status, exchange.model)
            self._log(exchange, scope, status, time.monotonic() - began)

    def _log(self, exchange: Exchange, scope: Scope, status: int, seconds: float) -> None:
        reason = exchange.reason if self._log_texts else exchange.logged_reason
        fields = {
            "request_id": exchange.request_id,
            "client": exchange.client,
            "method": scope["method"],
            "path": scope["path"][:MOST_PATH_CHARACTERS],
            "status": status,
            "param": exchange.param,
            "code": exchange.code,
            "seconds": round(seconds, 4),
        }
        level = logging.WARNING if status >= 500 else logging.INFO
        logger.log(level, "refused with %d: %s", status, reason, extra={"fields": fields})


async def answer(send: Send, status: int, body: Any, headers: dict[str, str]) -> None:
    """Send a whole answer in JSON with further headers, and close the connection."""
    content = json.dumps(body).encode()
    length = str(len(content))
    named = {"content-type": "application/json", "content-length": length, "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in {**named, **headers}.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, up to `DISCARD_BYTES`."""
    num_bytes, is_whole = 0, False
    while not is_whole and num_bytes < DISCARD_BYTES:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id in the headers of a request, or a new one."""
    for name, value in headers:
        own: str = value.decode("latin-1")
        if name == b"x-request-id" and CLIENT_ID.fullmatch(own):
            return own
    return secrets.token_hex(12)
