"""Page at ``/``: one file that asks models side by side and shows the engine at work."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response


def add_page(app: FastAPI) -> None:
    """Add the route ``/``. The page holds no data of this server: it calls the routes, with a key if one is needed."""
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = headers_of(page)

    async def root() -> Response:
        """Return the page."""
        return Response(page, media_type="text/html", headers=headers)

    app.get("/", include_in_schema=False)(root)


def headers_of(page: str) -> dict[str, str]:
    """Return a page's HTTP headers. They allow only the page's own script and style, and requests to its own server."""
    policy = {
        "default-src": "'none'", "script-src": _digests(page, "script"), "style-src": _digests(page, "style"),
        "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _digests(page: str, element: str) -> str:
    """Return sources for the page's content security policy: the SHA-256 digest of the text of each such element."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", page, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
