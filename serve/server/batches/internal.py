"""Requests of the server to itself, which need no connection."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message

HEADERS = [(b"content-type", b"application/json")]


async def post(app: ASGIApp, path: str, body: bytes, more: Mapping[str, Any]) -> tuple[int, bytes]:
    """Return the status and the body that an application answers a JSON body with.

    Args:
        app: The application.
        path: Path of the request.
        body: Its body.
        more: Further values of its ASGI scope.

    Raises what the application raises; it has answered by then.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": HEADERS,
        "client": None,
        "server": None,
        "state": {},
        **more,
    }
    status, parts, is_read = 0, list[bytes](), False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # the client never goes away
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
