"""One fleet of two real engines, started once for all tests that share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from anyio.from_thread import start_blocking_portal

from seer_servers.fleet import EngineSpec, LocalFleet
from seer_servers.kvpool.shm.pool import ShmPool
from seer_servers.model import ensure_default_model

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL_BYTES = 1 << 30


@pytest.fixture(scope="package")
def vllm_fleet(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Two real engines that share a KV pool, the first with drafts from siblings: `.urls`, `.engines`, `.pool`.

    In float32 chunked and continuous greedy runs agree bit for bit, with drafts and without. The fleet lives on an
    event loop of its own, in a thread, so that it outlives each test's loop. It ends when the process goes on to tests
    of another folder: an engine that the last test has killed would start again beside them.
    """
    plain = EngineSpec(model=str(ensure_default_model()), dtype="float32", max_model_len=2048)
    drafting = msgspec.structs.replace(plain, draft="grouped")
    folder = tmp_path_factory.mktemp("fleet")
    fleet = LocalFleet([drafting, plain], 2, folder, pool=ShmPool(folder, POOL_BYTES))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(fleet):
        yield fleet
