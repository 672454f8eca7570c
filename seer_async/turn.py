"""A turn of the core: the moment of the events it is taking in, and the commands they have led to so far.

Invariant: all parts of a core share one turn, so commands come out in the order in which they were decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seer_async.events import Command


class Turn:
    """`now` is seconds on the run's clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.commands: list[Command] = []

    def begin(self, now: float) -> None:
        """Other events, with no commands yet."""
        self.now = now
        self.commands = []

    def say(self, command: Command) -> None:
        """This is to be done, after what was said before."""
        self.commands.append(command)
