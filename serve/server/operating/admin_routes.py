"""Routes for operators, which need a key that may use them."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException

from serve.openai.bodies import Body
from serve.server.access.keys import Key
from serve.server.operating.reload import ReloadInProgress
from stu.common.text import Json

NOT_ADMIN = "it needs an API key with the word admin after it, in the file of --api-keys"


class ReloadBody(Body):
    """Body of a reload."""

    model: str | None = None
    """Name of the model; by default the first."""
    path: str | None = Field(None, min_length=1)
    """Model directory on the server; by default the one that is served, which may have changed."""
    one_by_one: bool | None = None
    """Exchange replicas one by one; by default only where memory has no room for both versions."""


class Models(Protocol):
    """All served models."""

    def reloading(self, name: str | None) -> Json:
        """Return the version of a model that takes new requests, and how far a reload is. Raises
        UserError."""

    async def reload(self, name: str | None, path: Path | None, one_by_one: bool | None) -> Json:
        """Load another version of a model. Raises as `Reloader.reload`."""


def add_admin_routes(app: FastAPI, models: Models, key_of: Callable[[Request], Key | None]) -> None:
    """Add `/admin/reload`."""

    def require_admin(request: Request) -> None:
        key = key_of(request)
        if key is None or not key.is_admin:
            raise HTTPException(403, NOT_ADMIN)

    @app.get("/admin/reload")
    async def show(request: Request, model: str | None = None) -> Json:
        require_admin(request)
        return models.reloading(model)

    @app.post("/admin/reload")
    async def reload(body: ReloadBody, request: Request) -> Json:
        require_admin(request)
        path = None if body.path is None else Path(body.path)
        try:
            return await models.reload(body.model, path, body.one_by_one)
        except ReloadInProgress as error:
            raise HTTPException(409, str(error)) from error
