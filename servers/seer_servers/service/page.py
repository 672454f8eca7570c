"""The status page at `/`: one file with everything in it, which asks for /v1/status once a second.

Invariants: the page loads nothing from elsewhere, and its policy forbids it; what engines and clients have named
reaches it as text only. The page itself needs no key and says nothing; /v1/status does.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK = "<{tag}>(.*?)</{tag}>"


class Page:
    """The part."""

    def __init__(self) -> None:
        self._page = (files("seer_servers.service") / "page.html").read_text(encoding="utf-8")
        self._headers = {
            "Content-Security-Policy": "; ".join(
                [
                    "default-src 'none'",
                    "connect-src 'self'",
                    f"script-src {_source(self._page, 'script')}",
                    f"style-src {_source(self._page, 'style')}",
                    "img-src data:",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                ]
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    @property
    def routes(self) -> Sequence[Route]:
        """One."""
        return [Route(method="GET", path="/", handler=self._show, summary="The status page", open=True)]

    async def start(self) -> None:
        """Nothing runs in the background."""

    async def stop(self) -> None:
        """Nothing runs in the background."""

    async def _show(self, _: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", charset="utf-8", headers=self._headers)


def _source(page: str, tag: str) -> str:
    """What allows the page's own block of this kind, and no other."""
    (block,) = re.findall(_BLOCK.format(tag=tag), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
