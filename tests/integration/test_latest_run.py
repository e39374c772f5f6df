"""What a page learns of a session's latest run: how it ended, also where its process died."""

from __future__ import annotations

import json

import pytest
from redis.asyncio import Redis

from agx.web.history import read_latest_run
from agx.web.runs import Who

STREAM = "agx:1:1:s"


async def add(client: Redis, kind: str, **body: object) -> None:
    await client.xadd(STREAM, {"type": kind, "origin": "opale", "body": json.dumps(body)})
    await client.expire(STREAM, 60)


@pytest.mark.parametrize(
    ("is_held", "end", "live", "outcome", "reason"),
    [
        (True, None, True, None, None),
        (False, None, False, "lost", None),
        (False, {"outcome": "cancelled", "reason": "cancel"}, False, "cancelled", "cancel"),
        (False, {}, False, None, None),  # a session that was opened by hand
    ],
)
async def test_how_the_latest_run_ended(
    configured: Redis, is_held: bool, end: dict[str, str] | None, live: bool, outcome: str | None, reason: str | None
) -> None:
    await add(configured, "begin", run_id="r")
    if is_held:
        await configured.set(f"{STREAM}:live", "r", ex=60)
    if end is not None:
        await add(configured, "end", **end)
    found = await read_latest_run(Who(1, 1), "s")
    assert found is not None
    assert (found.live, found.outcome, found.reason) == (live, outcome, reason)
