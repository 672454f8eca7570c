"""The draft server of a local fleet: a child process, kept alive, at an address that lasts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from typing import TYPE_CHECKING

from seer_servers.drafting.address import ADDRESS_ENV, socket_path
from seer_servers.drafting.link import ask_stats
from seer_servers.drafting.tokenlog import MAX_TOKENS
from seer_servers.kvpool.mooncake import Service
from seer_servers.ports import Ports

if TYPE_CHECKING:
    from pathlib import Path

_ROOTS = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")  # noqa: S108 - in a folder of mode 700
_MAX_ROOT = 80  # bytes; a socket's path has 107


class DraftService:
    """One fleet's draft server, whose log goes to `folder`/logs.

    It listens on a socket file in a private folder of its own; with `host`, on a free TCP port there, for engines on
    other machines, and then anybody who reaches that port can read and add tokens.
    """

    def __init__(self, folder: Path, *, host: str | None = None, max_tokens: int = MAX_TOKENS) -> None:
        self._ports = Ports(1 if host else 0)
        self.address = f"tcp://{host}:{self._ports[0]}" if host else _new_address()
        self._log = folder / "logs" / "draft-server.log"
        self._options = ["--max-tokens", str(max_tokens), *(["--anywhere"] if host else [])]
        self._service: Service | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the server.

        Raises:
            FleetError: It does not start; says why.
        """
        command = [sys.executable, "-m", "seer_servers.drafting.server", "--address", self.address, *self._options]
        self._service = Service("the draft server", command, dict(os.environ), self._log, self._answers)
        try:
            await self._service.start()
        except BaseException:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._service.keep())

    async def stop(self) -> None:
        """Stop the server and leave nothing but its log behind. Never raises."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._service is not None:
            with contextlib.suppress(OSError):
                await self._service.stop()
        path = socket_path(self.address)
        if path is not None:
            await asyncio.to_thread(shutil.rmtree, path.parent, ignore_errors=True)

    def env(self, index: int) -> dict[str, str]:
        """Return what engine `index` needs in its environment."""
        del index
        return {ADDRESS_ENV: self.address}

    async def _answers(self) -> bool:
        return await asyncio.to_thread(ask_stats, self.address, connect_s=0.1) is not None


def _new_address() -> str:
    """A socket file in a folder that is not there yet: the server makes it, and takes it away however we end."""
    root = next(root for root in _ROOTS if root and len(os.fsencode(root)) <= _MAX_ROOT and os.access(root, os.W_OK))
    return f"ipc://{root}/seer-{uuid.uuid4().hex[:16]}/drafts"
