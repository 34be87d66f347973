"""Answers to requests that fail, with OpenAI's statuses, types and codes."""

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serve.openai.errors import body_error, error_body, user_error_body
from serve.server.access.limits import RateLimited
from serve.server.exchange import FAULT, exchange_of
from serve.server.replicas.stream import Abandoned, Busy, EngineError, Unavailable
from serve.server.streams import TimedOut
from stu.common.errors import UserError

logger = logging.getLogger(__name__)

RETRY_SECONDS = "1"
REPLICAS_ENDED = "replicas_ended"
"""Code of the error of a request that several replicas ended during."""
NOT_FOUND = ("model_not_found", "response_not_found")
"""Codes of errors about something that does not exist."""


def error_answer(error: Exception) -> tuple[int, Any]:
    """Return the status and the body for an error. Errors that are not known here are faults of the
    server, whose message no client gets."""
    if isinstance(error, UserError):
        return 404 if error.code in NOT_FOUND else 400, user_error_body(error)
    if isinstance(error, RateLimited):
        return 429, error_body(str(error), error.kind, code="rate_limit_exceeded")
    if isinstance(error, Busy):
        return 429, error_body(str(error), "rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, Abandoned):
        return 503, error_body(str(error), "server_error", code=REPLICAS_ENDED)
    if isinstance(error, Unavailable):
        return 503, error_body(str(error), "server_error", code="unavailable")
    if isinstance(error, TimedOut):
        return 504, error_body(str(error), "server_error", code="timeout")
    return 500, error_body(str(error) if isinstance(error, EngineError) else FAULT, "server_error")


def add_error_answers(app: FastAPI) -> None:
    """Answer the errors that routes raise."""

    async def answer(request: Request, error: Exception) -> Response:
        status, body = error_answer(error)
        reason = error.without_value() if isinstance(error, UserError) else None
        headers = {"retry-after": RETRY_SECONDS} if status in (429, 503) else {}
        if isinstance(error, RateLimited):
            headers = error.headers
        if isinstance(error, Abandoned):
            # OpenAI's clients would send it twice more by themselves, for other replicas to end.
            headers = {"x-should-retry": "false"}
        return _response(request, status, body, headers, reason)

    # An exception that is none of the others is logged by `serve.server.exchange`.
    for kind in (UserError, RateLimited, Busy, Unavailable, TimedOut, EngineError, Exception):
        app.exception_handler(kind)(answer)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = [{**found, "loc": found["loc"][1:]} for found in error.errors()]
        first = errors[0]
        if first["type"] == "user_error" or (first["loc"] and first["type"] != "json_invalid"):
            return await answer(request, body_error(errors))
        reason = first.get("ctx", {}).get("error", first["msg"])
        message = (
            "the body must be a JSON object, sent with the header content-type: application/json: "
            f"{reason}"
        )
        return _response(request, 400, error_body(message, "invalid_request_error"), {})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message[:500], "invalid_request_error")
        return _response(request, error.status_code, body, dict(error.headers or {}))


def _response(
    request: Request, status: int, body: Any, headers: dict[str, str], reason: str | None = None
) -> Response:
    exchange_of(request.scope).refuse(body, reason)
    # In ASCII: a message may quote half of a surrogate pair, which UTF-8 cannot hold.
    return Response(json.dumps(body), status, headers, media_type="application/json")
