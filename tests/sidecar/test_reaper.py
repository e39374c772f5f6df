"""The reaper: one run that can't be finalized hides no other, whatever it raises."""

from __future__ import annotations

from typing import Any

import pytest
from support.replica import Queue

from agx.redis import keys
from agx.redis.address import parse_redis
from agx_sidecar.link import Link, open_client
from agx_sidecar.recovery.reaper import Reaper


async def test_a_run_that_raises_is_passed_over(queue: Queue, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = keys.leases("agx", 0)
    members = [keys.SessionKeys.of("agx", "acme", "ada", name).lease_member(name) for name in ("bad", "good")]
    queue.redis.zadd(leases, dict.fromkeys(members, 1))
    queue.redis.expire(leases, 60)

    async def finalize(self: Reaper, n: int, session: Any, run_id: str, death: Any) -> bool:
        if run_id == "bad":
            raise LookupError("of a kind that nobody expected")
        return True

    async def is_steady(self: Reaper) -> bool:
        return True

    monkeypatch.setattr(Reaper, "_finalize", finalize)
    monkeypatch.setattr(Reaper, "_is_steady", is_steady)
    link = Link(open_client(parse_redis(redis_url)))
    await Reaper(link, "agx")._sweep(1)
    await link.client.aclose()
    assert queue.redis.zrange(leases, 0, -1) == [members[0].encode()]
