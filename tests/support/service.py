"""A service process of its own, to be killed: it runs one staged agent and prints how far it got."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

import agx

from .agents import FakeSession, ScopeDeps, ScriptedAgent
from .forked import Forked
from .sdk import installed_sdk
from .waiting import wait_until

_INNER = ScriptedAgent(silent=True, streams=False)  # a run without ids is never streamed
# What runs, and the stage at which it holds.
STAGES = {
    "talking": (ScriptedAgent(hold_after=2), None),
    "silent": (ScriptedAgent(silent=True), None),
    "tool": (ScriptedAgent(call_tool=True, hold_tool=True), None),
    "sub-agent": (ScriptedAgent(call_tool=True, delegate=_INNER.agent(capabilities=[agx.AgxCapability()])), _INNER),
}


@asynccontextmanager
async def running_service(
    home: Path, url: str, stage: str, *, session: str = "s", sdk: bool = False
) -> AsyncIterator[Forked]:
    """A process that runs an agent and has reached its stage; killed with the block if it still lives.

    `home`: the directory of its log, in which each process of a test has its own session.
    """
    process = Forked(_main, url, stage, session, sdk, log=home / f"service-{session}.log")
    try:
        await wait_until(lambda: process.said.startswith("reached\n"), what="the stage is reached")
        yield process
    finally:
        process.end(signal.SIGKILL)


def _main(url: str, stage: str, session: str, sdk: bool) -> None:
    if sdk:
        with installed_sdk():
            asyncio.run(_serve(url, stage, session))
    else:
        asyncio.run(_serve(url, stage, session))


async def _serve(url: str, stage_name: str, session: str) -> None:
    """Run one agent; print `reached` where its stage holds, then the name of the error that ends it."""
    async with Redis.from_url(url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=0.9, retention=60, service_name="doomed"))
        stage, inner = STAGES[stage_name]
        running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", deps=ScopeDeps(session_id=session)))
        await (inner or stage).reached.wait()
        print("reached", flush=True)
        try:
            await running
        except agx.AgxError as error:
            print(type(error).__name__, flush=True)
        await agx.aclose()
