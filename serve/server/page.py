"""The playground: a page at / that asks this very server."""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "playground"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
FILES = {
    "/" if file.name == "index.html" else f"/playground/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in TYPES
}
"""By path. A browser can send no key when it opens a page, so these need none."""
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Asked for again each time, and sent again only if another version is installed.
    "cache-control": "no-cache",
}


def add_playground(app: FastAPI) -> None:
    """Serve the page and its files."""
    for path, file in FILES.items():
        _add_file(app, path, file.read_bytes(), TYPES[file.suffix])


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)
