"""The ASGI application: all routes, and the playground, a page at / that uses them."""

import hashlib
import json
import logging
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from serve.server.access.keys import Keys
from serve.server.batches.batch_routes import add_batch_routes, refuse_batch_routes
from serve.server.batches.decoding import Answering, RowRequest
from serve.server.batches.internal import post
from serve.server.completion_routes import add_completion_routes
from serve.server.error_answers import REPLICAS_ENDED, add_error_answers, error_answer
from serve.server.exchange import Exchange, exchange_of
from serve.server.information_routes import add_information_routes
from serve.server.json_body import JsonRoute
from serve.server.operating.admin_routes import add_admin_routes
from serve.server.response_routes import add_response_routes
from serve.server.service import Service

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "playground"
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
PLAYGROUND_FILES = {
    "/" if file.name == "index.html" else f"/playground/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in MEDIA_TYPES
}
"""Files of the playground, by path. They need no API key, as a browser that opens a page cannot
send one."""
PLAYGROUND_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A browser asks each time, and gets the file again only if another version is installed.
    "cache-control": "no-cache",
}


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(
        title="stu",
        version=service.version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        # A redirect would lead to any host that the request names.
        redirect_slashes=False,
    )
    app.router.route_class = JsonRoute
    add_error_answers(app)
    add_completion_routes(app, service)
    add_response_routes(app, service)
    add_information_routes(app, service)
    add_admin_routes(app, service, lambda request: exchange_of(request.scope).key)
    if service.batches is None:
        refuse_batch_routes(app)
    else:
        add_batch_routes(app, service.batches, lambda request: exchange_of(request.scope).owner)
    for path, file in PLAYGROUND_FILES.items():
        _add_file(app, path, file.read_bytes(), MEDIA_TYPES[file.suffix])
    return app


def row_answering(app: FastAPI, keys: Keys) -> Answering:
    """Return what answers the rows of batches as the application answers requests of their keys."""

    async def answer(request: RowRequest) -> tuple[int, bytes] | None:
        key = keys.of_owner(request.owner)
        exchange = Exchange(
            request.request_id,
            "batches" if key is None else f"batches of {key.name}",
            key,
            owner=request.owner,
            is_background=True,
            cut_off_if_stalled=lambda reason: False,
        )
        try:
            status, body = await post(app, request.path, request.body, {"stu.exchange": exchange})
        except Exception as error:
            fields = {"request_id": exchange.request_id}
            logger.exception("a row of a batch failed", extra={"fields": fields})
            status, values = error_answer(error)
            return status, json.dumps(values).encode()
        is_later = status in (429, 503) and exchange.code != REPLICAS_ENDED
        return None if is_later else (status, body)

    return answer


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**PLAYGROUND_HEADERS, "etag": tag}

    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)
