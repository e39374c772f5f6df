"""A process that starts a resumable run itself, as a web process does, to be killed. It runs no worker."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from redis.asyncio import Redis

import agx

from .agents import ScopeDeps
from .durable_worker import LEASE_TTL, Ledger, make_agent


def start(url: str, ledger: Path, grace: float) -> None:
    """Run the agent once; at SIGTERM close agx after `grace` seconds, as a service does."""
    asyncio.run(_start(url, Ledger(ledger), grace))


async def _start(url: str, ledger: Ledger, grace: float) -> None:
    async with Redis.from_url(url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE_TTL, retention=60))
        deps = ScopeDeps(scope="acme", user_id="ada", session_id="s")
        session = agx.RedisSession("acme", "ada", "s")
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        running = asyncio.create_task(
            agx.run(session, make_agent(ledger), "Where is my order?", deps, resume="support", args={"n": 1})
        )
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await agx.aclose(grace)
        with contextlib.suppress(agx.RunHandedOverError):
            await running
