"""Routes of OpenAI's batches: `/v1/batches`."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from pydantic import Field
from starlette.exceptions import HTTPException

from serve.openai.bodies import Body
from serve.server.batches.batches import Batches
from serve.server.batches.file_routes import (
    LEAST_SECONDS,
    MOST_SECONDS,
    Owner,
    add_file_routes,
    no_such,
    page,
)
from serve.server.batches.files import FILE_SECONDS
from serve.server.batches.progress import batch_object
from serve.server.batches.table import NewBatch
from stu.common.cli import option
from stu.common.errors import UserError
from stu.common.text import Json, require_unicode

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Paths that rows of a batch may have, where the server has them."""
OPTION = f"the option {option('batch_dir')} of stu-serve"
MOST_LISTED, LISTED = 100, 20
MOST_WINDOW_SECONDS = 30 * 24 * 3600
WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
MOST_PAIRS, MOST_KEY_CHARACTERS, MOST_VALUE_CHARACTERS = 16, 64, 512
"""Limits of metadata."""


class ExpiresAfter(Body):
    """Time after which the files with the results of a batch expire."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_SECONDS, le=MOST_SECONDS)]


class BatchBody(Body):
    """Body of `/v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[str, str], Field(fail_fast=True)] | None = None
    output_expires_after: ExpiresAfter | None = None


def add_batch_routes(app: FastAPI, batches: Batches, owner_of: Owner) -> None:
    """Add `/v1/files` and `/v1/batches`, where each owner sees its own alone.

    Rows may have the paths of `ENDPOINTS` that the application has by now.
    """
    add_file_routes(app, batches, owner_of)
    paths = {getattr(route, "path", "") for route in app.routes}
    endpoints = [path for path in ENDPOINTS if path in paths]

    @app.post("/v1/batches")
    async def create(body: BatchBody, request: Request) -> Json:
        return batch_object(await batches.create(_new_batch(body, owner_of(request), endpoints)))

    @app.get("/v1/batches")
    async def listed(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = LISTED,
    ) -> Json:
        rows, has_more = await batches.table.listed(owner_of(request), after, limit)
        return page([batch_object(row) for row in rows], has_more)

    @app.get("/v1/batches/{batch_id}")
    async def retrieve(batch_id: str, request: Request) -> Json:
        row = await batches.table.find(owner_of(request), batch_id)
        if row is None:
            raise no_such("batch")
        return batch_object(row)

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> Json:
        row = await batches.table.find(owner_of(request), batch_id)
        if row is None:
            raise no_such("batch")
        row = await batches.cancel(row["number"])
        if row["status"] not in ("cancelling", "cancelled"):
            status = row["status"]
            raise HTTPException(409, f"a batch with status {status} can no longer be cancelled")
        return batch_object(row)


def refuse_batch_routes(app: FastAPI) -> None:
    """Answer `/v1/files` and `/v1/batches` of a server without a folder for them."""

    async def refuse() -> None:
        raise HTTPException(404, f"this server has no files and batches: it needs {OPTION}")

    for path in ("/v1/files", "/v1/batches"):
        for more in ("", "/{rest:path}"):
            methods = ["GET", "POST", "DELETE"]
            app.api_route(path + more, methods=methods, include_in_schema=False)(refuse)


def _new_batch(body: BatchBody, owner: str, endpoints: Sequence[str]) -> NewBatch:
    """Return the batch that a body asks for. Raises UserError for values that are not allowed."""
    require_unicode("input_file_id", body.input_file_id)
    if body.endpoint not in endpoints:
        allowed = " or ".join(f'"{endpoint}"' for endpoint in endpoints)
        raise UserError("endpoint", body.endpoint, allowed)
    for key, value in (body.metadata or {}).items():
        require_unicode("metadata", key)
        require_unicode("metadata", value)
        if len(key) > MOST_KEY_CHARACTERS or len(value) > MOST_VALUE_CHARACTERS:
            allowed = (
                f"texts of at most {MOST_VALUE_CHARACTERS} characters, under keys of at most "
                f"{MOST_KEY_CHARACTERS}"
            )
            raise UserError("metadata", body.metadata, allowed)
    if len(body.metadata or {}) > MOST_PAIRS:
        raise UserError("metadata", allowed=f"an object of at most {MOST_PAIRS} texts")
    after = body.output_expires_after
    return NewBatch(
        owner,
        body.endpoint,
        body.input_file_id,
        body.completion_window,
        _seconds(body.completion_window),
        FILE_SECONDS if after is None else after.seconds,
        body.metadata,
    )


def _seconds(window: str) -> int:
    """Return the seconds of a completion window. Raises UserError for one that is not allowed."""
    found = WINDOW.fullmatch(window)
    seconds = int(found[1]) * UNIT_SECONDS[found[2]] if found else 0
    if not 1 <= seconds <= MOST_WINDOW_SECONDS:
        allowed = 'a time such as "24h", with s, m, h or d, of at most 30 days'
        raise UserError("completion_window", window, allowed)
    return seconds
