"""An environment of verifiers: three tiny tasks, two rewards, and a harness that asks the model once."""

from __future__ import annotations

from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI

__all__ = ["AskOnce", "ColoursTaskset"]

THINGS = ("the sky", "grass", "snow")


class ColourData(vf.TaskData):
    """One thing to name the colour of."""

    thing: str


class ColourTask(vf.Task[ColourData]):
    """Scored by what is said and how long it is; no model of these tests knows colours."""

    @vf.reward(weight=1.0)
    async def said_something(self, trace: vf.Trace) -> float:
        return float(bool(trace.last_reply))

    @vf.metric
    async def letters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or ""))


class ColoursTaskset(vf.Taskset[ColourTask, vf.TasksetConfig]):
    def load(self) -> list[ColourTask]:
        asked = [f"Name the colour of {thing}." for thing in THINGS]
        return [ColourTask(ColourData(prompt=prompt, thing=thing)) for prompt, thing in zip(asked, THINGS, strict=True)]


class AskOnce(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any,
        tool_interception_url: str | None = None,
    ) -> Any:  # fmt: skip
        client = AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0)
        reply = await client.chat.completions.create(
            model=ctx.model, messages=[{"role": "user", "content": data.prompt}]
        )
        return vf.ProgramResult(exit_code=0, stdout=reply.choices[0].message.content or "", stderr="")
