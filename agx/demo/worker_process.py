"""The demo's worker: it resumes runs whose process was killed, until SIGTERM: `python -m agx.demo.worker_process`."""

from __future__ import annotations

import asyncio
import sys

from redis.asyncio import Redis

from ..checkpoints.job import Job
from ..config import Config, configure
from ..engine.registry import aclose
from ..jobs.recipe import Call
from ..jobs.worker import Worker
from ..sessions.redis_session import RedisSession
from .agents import AGENTS, DemoDeps, ScriptedModel
from .scenarios import IN_A_PROCESS
from .traffic import LEASE_TTL, find_model


async def work(redis_url: str, model: str | None = None) -> None:
    """Resume runs of all agents."""

    async def make_call(job: Job) -> Call:
        session = RedisSession(job.scope_id, job.user_id, job.session_id)
        deps = DemoDeps(user_id=job.user_id, session_id=job.session_id, scope_id=job.scope_id)
        chosen = find_model(model) if model else ScriptedModel(IN_A_PROCESS[str(job.prompt)])
        return Call(session, AGENTS[job.agent], deps, {"model": chosen})

    async with Redis.from_url(redis_url) as client:
        configure(Config(redis=client, service_name="agx-demo", lease_ttl=LEASE_TTL))
        await Worker(dict.fromkeys(AGENTS, make_call)).run()
        await aclose()


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
