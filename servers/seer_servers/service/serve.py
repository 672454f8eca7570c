"""The service and its application, from a config to the signal that ends them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

from seer_async.service import Service
from seer_servers.service.app import App
from seer_servers.service.chat import Chat
from seer_servers.service.completions import Completions
from seer_servers.service.control import Control
from seer_servers.service.engines import Engines
from seer_servers.service.generate import Generate
from seer_servers.service.health import Health
from seer_servers.service.intake import Intake
from seer_servers.service.jobs import Jobs
from seer_servers.service.keys import Keys
from seer_servers.service.page import Page
from seer_servers.service.relay import Relay
from seer_servers.service.status import Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from seer_async.config import Config
    from seer_servers.service.part import Part


def parts_of(service: Service) -> list[Part]:
    """What the application is made of."""
    relay = Relay(service)
    intake = Intake(service, relay)
    jobs = Jobs(service)
    data = (Completions(intake), Chat(intake), Generate(intake), Engines(relay), Health(service))
    return [*data, Control(service, abort=intake.abort), jobs, Status(service, jobs), Page()]


@contextlib.asynccontextmanager
async def serving(config: Config, urls: Sequence[str]) -> AsyncIterator[tuple[Service, str]]:
    """The engines at `urls` behind one address, inside the block: the service, and its own URL."""
    keys = Keys(config.serve)  # before any engine is asked
    async with Service(config, urls) as service, App(config.serve, keys, parts_of(service)).listening() as url:
        yield service, url


async def serve(config: Config, urls: Sequence[str], *, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is open; a second signal gives that up.

    Raises:
        SeerError: The address is taken, or the engines cannot be used.
    """
    with _signals() as asked:
        task = asyncio.create_task(_serve(config, urls, asked[0], say))
        second = asyncio.create_task(asked[1].wait())
        await asyncio.wait([task, second], return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _serve(config: Config, urls: Sequence[str], asked: asyncio.Event, say: Callable[[str], None]) -> None:
    async with serving(config, urls) as (service, url):
        say(f"seer serve ready at {url}")
        ended = asyncio.create_task(service.wait())
        stopped = asyncio.create_task(asked.wait())
        await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if ended.done():
            await ended  # raises what ended it
        ended.cancel()
        say("finishing what is open; once more stops at once")


@contextlib.contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events that the first and the second signal set."""
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        yield first, second
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
