"""Which engine processes have the current weights.

Weights that were sent into engines are gone when an engine starts again, and its weight version need not show it: the
trainer may name all its versions alike. So the processes that took the last update are remembered by engine and boot
identity, and any other that claims the fleet's version gets nothing until it takes part in an update, or is seen to
change to that version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_async.service import Service
    from seer_async.types import EngineInfo


class Holders:
    """The processes that have what was last sent."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._boots: Mapping[str, str] | None = None  # by engine; None: nothing has been sent
        self._found: dict[str, tuple[str, str]] = {}  # boot and version of others when they were first seen

    def replace(self, boots: Mapping[str, str]) -> None:
        """New weights: these processes have them, and no others."""
        self._boots = boots
        self._found.clear()

    def among(self, boots: Mapping[str, str]) -> list[str]:
        """Those of these processes that have what was last sent; all, if nothing was."""
        return [name for name, boot in boots.items() if self._boots is None or self._boots.get(name) == boot]

    def objection(self, name: str, info: EngineInfo) -> str | None:
        """Why an engine must not sample although its weight version may be right, or None."""
        if self._boots is None or self._boots.get(name) == info.boot:
            return None
        instance = self._service.core.instances[name]
        version = instance.version if instance.up else info.weight_version
        boot, found = self._found.setdefault(name, (info.boot, version))
        if boot != info.boot:
            self._found[name] = info.boot, version
            found = version
        if version != self._service.core.versions.current or version != found:
            return None  # the core compares versions itself; or somebody has given it these weights since
        return f"it calls its weights {version} but has not got the last update"
