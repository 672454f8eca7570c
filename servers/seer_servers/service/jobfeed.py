"""Rollouts at work: their groups go to the service a window at a time, and what comes back is spooled.

Invariants: rollouts together keep at most half of `serve.max_requests` responses open, or one group where that is more;
the rest is for other clients. Rollouts take turns, group by group. Every response of a group that was begun is spooled
exactly once, unless its rollout ends before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from seer_async.api import CANCELLED, DONE, FAILED
from seer_async.errors import SeerError
from seer_async.sampling import response_seed
from seer_async.tickets import Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.options import GroupOptions
    from seer_async.service import Service
    from seer_async.tickets import Ticket
    from seer_async.types import Prompt, Sample
    from seer_servers.service.jobspool import Spool
    from seer_servers.service.jobstore import Store

_LOOK_S = 0.2  # other clients take room and give it back without a word
_BURST = 64  # groups submitted before others have their turn on the loop


class Job:
    """A rollout that runs. `open_groups` are the prompts and tickets of those that were begun and have not ended."""

    def __init__(self, spool: Spool, options: GroupOptions) -> None:
        self.spool = spool
        self.options = options
        self.begun = 0
        self.open = 0  # responses
        self.open_groups: dict[int, tuple[Prompt, Ticket]] = {}
        self.readers: dict[int, asyncio.Task[None]] = {}
        self.generating_s = 0.0  # of the responses that have ended
        self._prompts: Iterator[Prompt] = spool.prompts()

    @property
    def waiting(self) -> int:
        """Responses that are not begun."""
        return (self.spool.info.groups - self.begun) * self.spool.info.n

    def work(self) -> tuple[Prompt, Work]:
        """The next group."""
        info = self.spool.info
        prompt = next(self._prompts)
        seeds = tuple(response_seed(info.seed, prompt.id, index) for index in range(info.n))
        work = Work(prompt_token_ids=prompt.token_ids or [], n=info.n, options=self.options, seeds=seeds)
        return prompt, work

    def sample(self, prompt: Prompt, index: int, sample: Sample) -> Sample:
        """The sample under the names that its client knows."""
        return msgspec.structs.replace(
            sample,
            id=f"{prompt.id}/{index}",
            group=prompt.id,
            index=index,
            prompt=prompt.text,
            messages=prompt.messages,
            extra=prompt.extra,
            run=self.spool.info.id,
        )


class Feed:
    """The rollouts that run, and the task that feeds them to `service`."""

    def __init__(self, service: Service, store: Store) -> None:
        self.jobs: dict[str, Job] = {}
        self._service = service
        self._store = store
        self._turns: deque[Job] = deque()  # those with groups that are not begun, the next one first
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to feed."""
        self._task = asyncio.create_task(self._run(), name="rollouts")

    async def stop(self, status: str, error: str) -> None:
        """End every rollout."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for job in list(self.jobs.values()):
            self.end(job, status, error)

    def add(self, spool: Spool, options: GroupOptions) -> None:
        """Begin a rollout."""
        job = self.jobs[spool.info.id] = Job(spool, options)
        self._turns.append(job)
        self._changed.set()

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest."""
        self.end(job, CANCELLED, "")

    def end(self, job: Job, status: str, error: str = "") -> None:
        """A rollout ends, whatever of it is open."""
        del self.jobs[job.spool.info.id]
        if job in self._turns:
            self._turns.remove(job)
        for reader in job.readers.values():
            reader.cancel()
        for _, ticket in job.open_groups.values():
            self._service.cancel(ticket)
        job.spool.end(status, error)
        self._changed.set()

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            if self._burst():
                await asyncio.sleep(0)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S if self._turns else None):
                    await self._changed.wait()

    def _burst(self) -> bool:
        """Begin a few groups; whether more may follow at once."""
        return all(self._begin_next() for _ in range(_BURST))

    def _begin_next(self) -> bool:
        """Begin the group whose turn it is, if there is one and room for it."""
        if not self._turns or not self._room(self._turns[0].spool.info.n):
            return False
        job = self._turns[0]
        self._turns.rotate(-1)
        try:
            self._begin(job)
        except (SeerError, OSError, msgspec.DecodeError, StopIteration) as error:
            self.end(job, FAILED, f"group {job.begun + 1} of {job.spool.info.groups} could not begin: {error}")
        return True

    def _room(self, n: int) -> bool:
        """Whether `n` more responses of rollouts may be open; while the service is paused, none."""
        most = self._service.config.serve.max_requests
        mine = sum(job.open for job in self.jobs.values())
        allowed = not mine or mine + n <= most // 2
        return allowed and self._service.core.buffer.open + n <= most and not self._service.paused

    def _begin(self, job: Job) -> None:
        prompt, work = job.work()
        ticket = self._service.submit(work)
        number, job.begun, job.open = job.begun, job.begun + 1, job.open + work.n
        job.open_groups[number] = prompt, ticket
        job.readers[number] = asyncio.create_task(self._read(job, number, prompt, ticket))
        if not job.waiting:
            self._turns.remove(job)

    async def _read(self, job: Job, number: int, prompt: Prompt, ticket: Ticket) -> None:
        """Spool a group's samples."""
        async for index, sample in ticket.finished():
            job.open -= 1
            job.generating_s += sample.timings.generating
            self._changed.set()
            try:
                self._store.append(job.spool, number, job.sample(prompt, index, sample))
            except OSError as error:
                self.end(job, FAILED, f"the samples cannot be written: {error.strerror or error}")
                return
        del job.open_groups[number], job.readers[number]
        if not job.waiting and not job.open_groups:
            self.end(job, DONE)
