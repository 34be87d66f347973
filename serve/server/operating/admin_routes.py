"""Routes for operators, which need a key that may use them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException

from serve.openai.bodies import Body
from serve.server.access.keys import Key
from serve.server.operating.reload import Reloader, ReloadInProgress
from stu.common.text import Json

NOT_ADMIN = "it needs an API key with the word admin after it, in the file of --api-keys"


class ReloadBody(Body):
    """Body of a reload."""

    model: str | None = Field(None, min_length=1)
    """Model directory on the server; by default the one that is served, which may have changed."""
    one_by_one: bool | None = None
    """Exchange replicas one by one; by default only where memory has no room for both versions."""


def add_admin_routes(
    app: FastAPI, reloader: Reloader[Any], key_of: Callable[[Request], Key | None]
) -> None:
    """Add `/admin/reload`."""

    def require_admin(request: Request) -> None:
        key = key_of(request)
        if key is None or not key.is_admin:
            raise HTTPException(403, NOT_ADMIN)

    @app.get("/admin/reload")
    async def show(request: Request) -> Json:
        require_admin(request)
        return reloader.description()

    @app.post("/admin/reload")
    async def reload(body: ReloadBody, request: Request) -> Json:
        require_admin(request)
        path = None if body.model is None else Path(body.model)
        try:
            return await reloader.reload(path, body.one_by_one)
        except ReloadInProgress as error:
            raise HTTPException(409, str(error)) from error
