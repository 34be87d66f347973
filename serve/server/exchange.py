"""ASGI middleware around all others: gives every request an id, and logs every refusal.

A client's own `X-Request-Id` is used where it is short and printable, and sent back either way, so
that a line of this log can be found from a gateway's or a client's.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai.schemas import error_body

logger = logging.getLogger(__name__)

DISCARD_SECONDS, DISCARD_BYTES = 10.0, 2**26
"""How much is still read of a body that is refused."""
FAULT = "the server failed; its log says why"
MOST_ID_CHARACTERS = 128
MOST_PATH_CHARACTERS = 200
CLIENT_ID = re.compile(rf"[!-~]{{1,{MOST_ID_CHARACTERS}}}")
"""Printable ASCII without spaces."""
ENDED = r"(?:is not (?:allowed|served)|does not exist here)"
QUOTED = re.compile(
    rf"""(field "[\w.]{{1,60}}")|(?<!\w)["'\[{{].*?(?= {ENDED}(?!.* {ENDED})|$)|"""
    r"(?<=^messages cannot be written by the chat template: ).*|"
    r"(?<=json_schema is not allowed: ).*|(?<=regex is not allowed: ).*|(?<=cannot be met: ).*",
    re.DOTALL,
)
"""Parts of an error's message that may repeat a body's text, and in the group the names of fields,
which may stay."""


@dataclass
class Exchange:
    """A request and its answer, as the log and the queue know it."""

    request_id: str
    client: str = ""
    """The client's address, or the position of its key among all keys: requests of different
    clients are taken in turn."""
    reason: str = ""
    """Why the request was refused, with OpenAI's name of the error's field and code if there are
    any."""
    param: str | None = None
    code: str | None = None
    cut_off_if_stalled: Callable[[str], bool] = lambda reason: True
    """Closes the client's connection at once, for a reason that the log gets, if the client takes
    nothing; returns whether it did."""

    def refuse(self, body: Any) -> None:
        """Remember OpenAI's body of an error, for the log."""
        error = body["error"]
        self.reason, self.param, self.code = error["message"], error["param"], error["code"]


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """Return the exchange of a request's ASGI scope."""
    found: Exchange = scope["stu.exchange"]
    return found


class Exchanges:
    """The middleware.

    log_texts: write reasons whole, though they may quote prompts. count: called with the status of
    each refusal.
    """

    def __init__(
        self, app: ASGIApp, log_texts: bool, count: Callable[[int], None] | None = None
    ) -> None:
        self._app, self._log_texts, self._count = app, log_texts, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens meanwhile."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else "local"
        exchange = Exchange(request_id(scope["headers"]), address)
        if cut_off := scope.get("state", {}).get(
            "cut_off_if_stalled"
        ):  # of serve.server.connection
            exchange.cut_off_if_stalled = cut_off
        status, began = 0, time.monotonic()
        is_read = False

        async def received() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", exchange.request_id.encode())
                message = {**message, "headers": [*message["headers"], header]}
            elif status >= 400 and not message.get("more_body", False) and not is_read:
                # A socket that is closed with unread bytes resets the connection, and its client
                # sees no answer.
                await send({**message, "more_body": True})
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_discard(received), DISCARD_SECONDS)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        # HEAD is answered as GET is; the HTTP server leaves the body out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        inner = {**scope, "method": method, "stu.exchange": exchange}
        try:
            await self._app(inner, received, send_with_id)
        except Exception:
            fields = {"request_id": exchange.request_id}
            logger.exception("a request failed", extra={"fields": fields})
            if status == 0:
                body = error_body(FAULT, "server_error")
                exchange.refuse(body)
                await answer(send_with_id, 500, body, {})
        # serve.server.connection has logged and counted what it refuses itself.
        if status >= 400 and not scope.get("state", {}).get("is_refused"):
            if self._count is not None:
                self._count(status)
            self._log(exchange, scope, status, time.monotonic() - began)

    def _log(self, exchange: Exchange, scope: Scope, status: int, seconds: float) -> None:
        reason = exchange.reason if self._log_texts else unquoted(exchange.reason)
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


def unquoted(message: str) -> str:
    """Return an error's message without what it may quote from a body."""
    return QUOTED.sub(lambda match: match[1] or "..", message)


async def answer(send: Send, status: int, body: Any, headers: dict[str, str]) -> None:
    """Send a whole answer in JSON, and close the connection."""
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
    """Return the id that a request's headers give it, or a new one."""
    for name, value in headers:
        given: str = value.decode("latin-1")
        if name == b"x-request-id" and CLIENT_ID.fullmatch(given):
            return given
    return secrets.token_hex(12)
