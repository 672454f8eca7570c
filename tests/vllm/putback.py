"""Leaving the shared fleet as it was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from seer_servers.model import ensure_default_model

if TYPE_CHECKING:
    from seer_servers.fleet import LocalFleet


async def put_back(fleet: LocalFleet) -> None:
    """The weights and their name that all other tests of the fleet sample from."""
    update = {"update_info": {"path": str(ensure_default_model())}}
    async with httpx.AsyncClient(timeout=120) as client:
        for url in fleet.urls:
            for path, body in [
                ("/start_weight_update", {}), ("/update_weights", update),
                ("/finish_weight_update", {"weight_version": "default"}),
            ]:  # fmt: skip
                (await client.post(url + path, json=body)).raise_for_status()
