"""Files of the page, read once: a path that is not among their names is not there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from inference.serving.errors import ApiError

PAGE = Path(__file__).parent / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png",
    ".ico": "image/x-icon", ".webp": "image/webp", ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json", ".txt": "text/plain; charset=utf-8",
}
"""By the endings of names. Files with others, of an editor or of Python, are not served."""


class PageFile(NamedTuple):
    """A file and the headers that it is sent with."""

    content: bytes
    content_type: str
    etag: str


def read_page(folder: Path = PAGE) -> dict[str, PageFile]:
    """Read the page's files -> their names relative to the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        content_type = CONTENT_TYPES.get(path.suffix.lower())
        if content_type is None or not path.is_file() or path.name.startswith("."):
            continue
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        files[path.relative_to(folder).as_posix()] = PageFile(content, content_type, etag)
    return files


def page_response(files: dict[str, PageFile], name: str, request: Request) -> Response:
    """Return a file, or 304 for one that the browser has. ApiError 404 for any other name."""
    file = files.get(name)
    if file is None:
        raise ApiError(404, f"the page has no file '{name[:100]}'")
    # no-cache: kept by the browser, and asked for again with its etag, so that an update is seen
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = [tag.strip().removeprefix("W/")
             for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(None, 304, headers)
    return Response(file.content, 200, headers, file.content_type)
