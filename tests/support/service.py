"""A service process of its own, to be killed: it runs one staged agent and says how far it got."""

from __future__ import annotations

import asyncio
import sys

from redis.asyncio import Redis

import agx

from .agents import FakeSession, ScopeDeps, ScriptedAgent
from .sdk import installed_sdk

_INNER = ScriptedAgent(silent=True, streams=False)  # a run without ids is never streamed
# What runs, and the stage at which it holds.
STAGES = {
    "talking": (ScriptedAgent(hold_after=2), None),
    "silent": (ScriptedAgent(silent=True), None),
    "tool": (ScriptedAgent(call_tool=True, hold_tool=True), None),
    "sub-agent": (ScriptedAgent(call_tool=True, delegate=_INNER.agent(capabilities=[agx.AgxCapability()])), _INNER),
}


async def serve(url: str, stage_name: str, session: str) -> None:
    """Run one agent; print `reached` where its stage holds, then whatever became of the run."""
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


def main() -> None:
    url, stage_name, session, sdk = sys.argv[1:]
    if sdk == "sdk":
        with installed_sdk():
            asyncio.run(serve(url, stage_name, session))
    else:
        asyncio.run(serve(url, stage_name, session))


if __name__ == "__main__":
    main()
