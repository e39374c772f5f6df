"""What a replay costs: a client that comes back reads a whole stream again, beside a plain XRANGE with its frames."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_ai.ui.vercel_ai import VercelAIEventStream
from redis.asyncio import Redis

import agx
from agx.embedded.server import EmbeddedServer
from agx.listeners.sse import event_chunks
from agx.replay import replay

from . import machine, workers
from .agents import configure_agx
from .report import Row
from .workers import Line

_EVENTS = 5_000
_ROUNDS = 5


def measure_replay() -> list[Row]:
    """Measure a replay of 5,000 events: as `sse()` yields it, as a response writes it, and as a chat page gets it."""
    with EmbeddedServer() as server:
        costs: dict[str, float] = workers.measure(machine.CLIENT_CORE, replay_all, server.url)
    return [
        Row(
            f"replay of 5,000 events, {what}, CPU per event",
            f"{goal} us",
            f"{costs['xrange']:.1f} us",
            f"{costs[name]:.1f} us",
            "",
            costs[name] <= goal,
        )
        for what, name, goal in (
            ("`sse()`", "sse", 4),
            ("in the chunks of a response", "chunks", 8),
            ("the frames of a chat route", "chat", 25),
        )
    ]


async def replay_all(line: Line, url: str) -> dict[str, float]:
    """Return the least CPU of each way, in microseconds per event."""
    configure_agx(url)
    await agx.start(1, 1, "s")
    delta = {"event": "part_delta", "idx": 0, "event_idx": 0, "part_kind": "text", "part_delta_kind": "text"}
    start = {"event": "part_start", "idx": 0, "event_idx": 0, "part_kind": "text", "content": ""}
    await agx.add(1, 1, "s", type="event", origin="pydantic-ai", body=start)
    for _ in range(_EVENTS):
        await agx.add(1, 1, "s", type="event", origin="pydantic-ai", body={**delta, "content_delta": "token "})
    await agx.stop(1, 1, "s", grace_period=600)
    async with Redis.from_url(url) as redis:

        async def xrange() -> None:
            for entry_id, fields in await redis.xrange("agx:1:1:s"):
                b"id: %b\ndata: %b\n\n" % (entry_id, fields[b"body"])

        async def sse() -> None:
            async for _ in agx.sse(1, 1, "s"):
                pass

        async def chunks() -> None:
            async for _ in event_chunks(1, 1, "s", None, wait=1):
                pass

        async def chat() -> None:
            stream: VercelAIEventStream[Any, Any] = VercelAIEventStream(sdk_version=7)
            async for chunk in stream.transform_stream(replay(1, 1, "s")):
                stream.encode_event(chunk)

        costs = {one.__name__: await _least(one) for one in (xrange, sse, chunks, chat)}
    await agx.aclose()
    return costs


async def _least(replay: Callable[[], Awaitable[None]]) -> float:
    costs = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        await replay()
        costs.append((time.process_time() - began) * 1e6 / _EVENTS)
    return min(costs)
