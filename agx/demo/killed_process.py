"""A process of the demo that runs one scenario until it is killed: `python -m agx.demo.killed_process`."""

from __future__ import annotations

import asyncio
import sys

from redis.asyncio import Redis

from ..config import Config, configure
from ..engine.registry import aclose
from ..runs.runner import run
from ..sessions.redis_session import RedisSession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .scenarios import IN_A_PROCESS
from .traffic import LEASE_TTL, find_model


async def play(  # noqa: PLR0917 - the arguments of the command line
    redis_url: str, scope: str, user: str, session: str, prompt: str, model: str | None = None
) -> None:
    """Run the scenario with this prompt; with a real model and a short answer it may complete."""
    scenario = IN_A_PROCESS[prompt]
    async with Redis.from_url(redis_url) as client:
        configure(Config(redis=client, service_name="agx-demo", lease_ttl=LEASE_TTL))
        await run(
            RedisSession(scope, user, session),
            AGENTS[scenario.agent],
            prompt,
            DemoDeps(user_id=user, session_id=session, scope_id=scope),
            resume=scenario.agent if scenario.resumable else None,
            model=find_model(model) if model else ScriptedModel(scenario),
        )
        await aclose()


if __name__ == "__main__":
    asyncio.run(play(*sys.argv[1:]))
