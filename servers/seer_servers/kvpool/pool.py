"""What a fleet on this machine needs from a KV pool, whichever it is."""

from __future__ import annotations

from typing import Protocol


class Pool(Protocol):
    """A pool, seen by the launcher: services to run, and what each engine must be told to take part."""

    kind: str

    async def start(self) -> None:
        """Bring up the services that the pool needs, if any.

        Raises:
            FleetError: They do not start; says what to do.
        """

    async def stop(self) -> None:
        """Stop the services and leave nothing behind. Never raises."""

    def arguments(self, index: int) -> list[str]:
        """Return vLLM's command-line arguments for engine `index`."""

    def env(self, index: int) -> dict[str, str]:
        """Return the environment variables of engine `index`."""
