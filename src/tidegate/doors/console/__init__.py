"""The console: static files, which read and change everything through /admin/v1. They are in memory; nothing is built.

The same page answers at the path of each view, so that a link to a view works.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

import msgspec
from fastapi import APIRouter, Request, Response

PREFIX: Final = "/console"
VIEWS: Final = ("/", "/callers", "/customers", "/policy", "/violations", "/audit", "/system")
"""Paths of the views; `static/app.js` has the same."""

_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "LICENSE": "text/plain; charset=utf-8",
}


class StaticFile(msgspec.Struct, frozen=True):
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def static_files() -> dict[str, StaticFile]:
    """All files by path below `static/`."""
    found: dict[str, StaticFile] = {}
    _add(found, resources.files(__name__).joinpath("static"), "")
    return found


def console_routes() -> APIRouter:
    """The routes of the console, for anyone: its files contain nothing of the catalog."""
    files = static_files()
    routes = APIRouter(include_in_schema=False)

    def respond(request: Request, file: StaticFile) -> Response:
        # Checked each time: after an upgrade, an old script must not call a new server.
        headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    async def view(request: Request) -> Response:
        return respond(request, files["index.html"])

    async def static(request: Request) -> Response:
        return respond(request, files[request.url.path.removeprefix(PREFIX + "/")])

    for path in VIEWS:
        routes.add_api_route(path, view, methods=["GET", "HEAD"])
    for name in files:
        if name != "index.html":
            routes.add_api_route(f"{PREFIX}/{name}", static, methods=["GET", "HEAD"])
    return routes


def _add(found: dict[str, StaticFile], folder: Traversable, prefix: str) -> None:
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        name = prefix + entry.name
        if entry.is_dir():
            _add(found, entry, f"{name}/")
            continue
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            found[name] = StaticFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
