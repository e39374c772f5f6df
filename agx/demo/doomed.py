"""A service process of the demo, which plays one scene until it is killed: `python -m agx.demo.doomed`."""

from __future__ import annotations

import asyncio
import sys

from redis.asyncio import Redis

from ..config import Config, configure
from ..engine.registry import aclose
from ..runs.runner import run
from ..testing import MemorySession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .scenes import POWER_CUT
from .traffic import LEASE_TTL, find_model


async def play(redis_url: str, scope: str, user: str, session: str, model: str | None = None) -> None:
    """Run the scene; with a real model's short answer it may come to its end."""
    async with Redis.from_url(redis_url) as client:
        configure(Config(redis=client, service_name="agx-demo", lease_ttl=LEASE_TTL))
        deps = DemoDeps(user_id=user, session_id=session, scope_id=scope)
        answering = find_model(model) if model else ScriptedModel(POWER_CUT)
        await run(MemorySession(session), AGENTS[POWER_CUT.agent], POWER_CUT.prompt, deps, model=answering)
        await aclose()


if __name__ == "__main__":
    asyncio.run(play(*sys.argv[1:]))
