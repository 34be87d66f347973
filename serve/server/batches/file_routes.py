"""Routes of OpenAI's files: `/v1/files`."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Annotated, BinaryIO, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from serve.server.batches.batches import Batches
from serve.server.batches.files import FILE_SECONDS, NewFile
from serve.server.batches.store import new_id
from serve.server.batches.upload import FIELDS, Form
from stu.common.cli import option
from stu.common.errors import UserError
from stu.common.text import Json

Owner = Callable[[Request], str]
"""Returns the owner of what a request asks for."""

LEAST_SECONDS, MOST_SECONDS = 3600, FILE_SECONDS
"""Bounds of the time after which a file expires."""
MOST_LISTED = 10_000
READ_BYTES = 2**18
_PROPERTIES = {
    name: {"type": "string", **({"format": "binary"} if name == "file" else {})} for name in FIELDS
}
_FORM = {"type": "object", "required": ["file", "purpose"], "properties": _PROPERTIES}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
"""Description of the body for /openapi.json."""


def add_file_routes(app: FastAPI, batches: Batches, owner_of: Owner) -> None:
    """Add `/v1/files`, where each owner sees its own files alone."""
    files = batches.files

    @app.post("/v1/files", openapi_extra=UPLOAD)
    async def upload(request: Request) -> Json:
        owner, file_id = owner_of(request), new_id("file-")
        with files.receiving(owner, file_id) as arriving:
            await arriving.reserve(int(request.headers.get("content-length", 0)))
            with arriving.path.open("xb") as file:
                form = Form(request.headers.get("content-type", ""), file, arriving.reserve)
                await form.read(request.stream())
                new = _new_file(file_id, owner, form, batches.limits.file_bytes)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            return await files.add(new)

    @app.get("/v1/files")
    async def listed(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Json:
        return page(*await files.listed(owner_of(request), after, limit, order, purpose))

    @app.get("/v1/files/{file_id}")
    async def retrieve(file_id: str, request: Request) -> Json:
        stored = await files.get(owner_of(request), file_id)
        if stored is None:
            raise no_such("file")
        return stored

    @app.delete("/v1/files/{file_id}")
    async def delete(file_id: str, request: Request) -> Json:
        if not await files.delete(owner_of(request), file_id):
            raise no_such("file")
        return {"id": file_id, "object": "file", "deleted": True}

    @app.get("/v1/files/{file_id}/content")
    async def content(file_id: str, request: Request) -> Response:
        stored = await retrieve(file_id, request)
        try:
            file = await asyncio.to_thread(files.path(file_id).open, "rb")
        except FileNotFoundError:  # it has just been deleted
            raise no_such("file") from None
        headers = {"content-length": str(stored["bytes"])}
        return StreamingResponse(
            _blocks(file), media_type="application/octet-stream", headers=headers
        )


def page(objects: list[Json], has_more: bool) -> Json:
    """Return a page of a list, as OpenAI's object."""
    ids = [found["id"] for found in objects] or [None]
    ends = {"first_id": ids[0], "last_id": ids[-1]}
    return {"object": "list", "data": objects, **ends, "has_more": has_more}


def no_such(kind: str) -> HTTPException:
    """Return the error of an object that an owner does not have."""
    return HTTPException(404, f"there is no such {kind}")


def _new_file(file_id: str, owner: str, form: Form, most_bytes: int) -> NewFile:
    """Return the file of a form. Raises UserError if a field is missing or wrong."""
    values = form.values
    if form.filename is None:
        raise UserError("file", message='the form has no field "file": add a file of JSON lines')
    purpose = values.get("purpose")
    if purpose != "batch":
        raise UserError("purpose", purpose, '"batch"')
    if form.num_bytes > most_bytes:
        fix = f"it has {form.num_bytes} bytes, and a file may have {most_bytes}: divide it"
        raise UserError("file", message=f"file: {fix} ({option('max_file_bytes')})")
    anchor, seconds = (values.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return NewFile(file_id, owner, "batch", form.filename, form.num_bytes, FILE_SECONDS)
    if anchor != "created_at":
        raise UserError("expires_after[anchor]", anchor, '"created_at"')
    number = int(seconds) if seconds is not None and seconds.isdecimal() else 0
    if not LEAST_SECONDS <= number <= MOST_SECONDS:
        allowed = f"a whole number from {LEAST_SECONDS} to {MOST_SECONDS}"
        raise UserError("expires_after[seconds]", seconds, allowed)
    return NewFile(file_id, owner, "batch", form.filename, form.num_bytes, number)


async def _blocks(file: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while block := await asyncio.to_thread(file.read, READ_BYTES):
            yield block
    finally:
        file.close()
