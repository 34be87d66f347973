"""ASGI middleware that checks the API key and the size of a request before its body is read."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai.errors import error_body
from serve.server.access.keys import Keys
from serve.server.app import PLAYGROUND_FILES
from serve.server.exchange import answer, exchange_of, has_file

MAX_HEADER_BYTES = 16 * 2**10
OPEN_PATHS = frozenset({"/health", "/ready", *PLAYGROUND_FILES})
"""Paths that need no API key, which probes and browsers that open a page cannot send."""
FORM_BYTES = 2**16
"""Size of a form without the file in it."""


class Guard:
    """The middleware.

    Args:
        app: The application inside.
        keys: Valid API keys; none if requests need no key.
        max_body_bytes: Limit of a request's body.
        max_file_bytes: Limit of a file in a form.
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body_bytes: int, max_file_bytes: int) -> None:
        self._app, self._keys, self._max_body_bytes = app, keys, max_body_bytes
        self._max_form_bytes = max_file_bytes + FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, exchange = dict(scope["headers"]), exchange_of(scope)

        async def refuse(status: int, body: Any, more: dict[str, str]) -> None:
            exchange.refuse(body)
            await answer(send, status, body, more)

        exchange.key = self._keys.find(headers.get(b"authorization", b""))
        if exchange.key is not None:
            exchange.client = exchange.key.name
            exchange.owner = exchange.key.owner
        elif len(self._keys) and scope["path"] not in OPEN_PATHS:
            message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
            body = error_body(message, "invalid_request_error", code="invalid_api_key")
            await refuse(401, body, {"www-authenticate": "Bearer"})
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            message = f"the headers have more than {MAX_HEADER_BYTES} bytes: send less"
            await refuse(431, error_body(message, "invalid_request_error"), {})
            return
        most = self._max_form_bytes if has_file(scope) else self._max_body_bytes
        too_large = f"the body has more than {most} bytes: send less at once"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await refuse(413, error_body(too_large, "invalid_request_error"), {})
            return
        num_bytes, is_whole = 0, False

        async def counted() -> Message:
            nonlocal num_bytes, is_whole
            message = await receive()
            if message["type"] == "http.disconnect" and not is_whole:
                raise HTTPException(499, "the client went away before its body was whole")
            is_whole = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, counted, send)
