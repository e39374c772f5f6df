"""A process of the demo that runs one scenario until it is killed: `python -m agx.demo.killed_process`."""

from __future__ import annotations

import asyncio
import sys

from redis.asyncio import Redis

from ..config import Config, configure
from ..engine.registry import aclose
from ..runs.runner import run
from ..testing import MemorySession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .scenarios import KILLED
from .traffic import LEASE_TTL, find_model


async def play(redis_url: str, scope: str, user: str, session: str, model: str | None = None) -> None:
    """Run the scenario; with a real model and a short answer it may complete."""
    async with Redis.from_url(redis_url) as client:
        configure(Config(redis=client, service_name="agx-demo", lease_ttl=LEASE_TTL))
        deps = DemoDeps(user_id=user, session_id=session, scope_id=scope)
        chosen = find_model(model) if model else ScriptedModel(KILLED)
        await run(MemorySession(session), AGENTS[KILLED.agent], KILLED.prompt, deps, model=chosen)
        await aclose()


if __name__ == "__main__":
    asyncio.run(play(*sys.argv[1:]))
