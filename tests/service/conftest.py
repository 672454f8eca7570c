from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.live.engines import MockProcess, mock_engines
from tests.service.server import SPEED

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def engines() -> Iterator[list[MockProcess]]:
    with mock_engines(SPEED, SPEED) as two:
        yield two
