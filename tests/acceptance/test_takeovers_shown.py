"""A worker is killed: what the console, the command line and the metrics show of its runs, and a cancel in the gap."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from redis.asyncio import Redis
from support.durable_worker import LEASE_TTL, STEPS, WORDS, Ledger, open_database, work
from support.forked import Forked
from support.replica import Replica, Scrape
from support.visitor import TOKEN, Visitor, console_port
from support.waiting import wait_until

import agx
from agx.sessions.sql_session import SqlSessions

AGX = Path(sysconfig.get_path("scripts")) / "agx"
GOOD = 8  # jobs beside the poison


@pytest.fixture
async def sidecar(redis_url: str, tmp_path: Path) -> AsyncIterator[Replica]:
    """A sidecar that has a console, on a server that a service with short leases uses."""
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE_TTL, retention=60))
        replica = Replica(
            tmp_path / "sidecar", redis_url, AGX_CONSOLE="full", AGX_CONSOLE_PORT="0", AGX_CONSOLE_TOKEN=TOKEN,
            AGX_SINKS="metrics",
        )  # fmt: skip
        yield replica
        replica.end()
        await agx.aclose()


async def _start_worker(url: str, ledger: Path) -> Forked:
    names = (ledger.with_name(f"worker-{n}.log") for n in range(100))
    log = next(name for name in names if not name.exists())
    process = Forked(work, url, ledger, log=log)
    await wait_until(lambda: process.said == "ready\n", what=f"a worker: {process.said}")
    return process


async def _follow(session: str) -> list[dict[str, Any]]:
    events = agx.listen("acme", "ada", session, serialize=False, wait=60, timeout=60)
    return [event async for event in events]


async def _agx(redis_url: str, *args: str) -> str:
    process = await asyncio.create_subprocess_exec(AGX, *args, "--redis", redis_url, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return out.decode()


async def _scrape(sidecar: Replica, wanted: dict[str, float]) -> Scrape:
    """Return the sidecar's metrics, once these sums over all labels are reached."""

    async def look() -> Scrape | None:
        seen = await asyncio.to_thread(sidecar.scrape)
        return seen if all(seen.total(name) == value for name, value in wanted.items()) else None

    return await wait_until(look, what=f"metrics {wanted}")


async def test_the_runs_of_a_killed_worker_are_shown_cancelled_and_resumed(
    redis_url: str, sidecar: Replica, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    database = open_database(ledger)
    store = SqlSessions(database)
    await store.create_table()
    killed = await _start_worker(redis_url, ledger)
    following = {session: asyncio.create_task(_follow(session)) for session in ("shown", "stopped", "stored")}
    runs = {
        session: await agx.submit(
            "acme", "ada", session, agent="stored" if session == "stored" else "support", prompt="Where is my order?"
        )
        for session in following
    }
    await wait_until(lambda: [what for _, what in Ledger(ledger).read()].count("slow 1") == len(runs))
    killed.end(signal.SIGKILL)

    # In the gap the runs are live: shown as recovering, cancelled, busy.
    visitor = Visitor(await asyncio.to_thread(console_port, sidecar))
    await asyncio.to_thread(visitor.log_in)
    query = urlencode({"scope": "acme", "user": "ada", "session": "shown", "run": runs["shown"]})

    async def page() -> str:
        return (await asyncio.to_thread(visitor.get, f"/run?{query}")).text

    async def is_recovering() -> bool:
        return "recovering, waits for a worker" in await page()

    await wait_until(is_recovering)
    listed = json.loads(await _agx(redis_url, "ls", "--json"))
    assert {run["session"]: run["state"] for run in listed} == dict.fromkeys(runs, "recovering")
    assert await agx.cancel("acme", "ada", "stopped")
    with pytest.raises(agx.SessionBusyError):
        await agx.submit("acme", "ada", "shown", agent="support", prompt="Hello?")
    for session in ("first", "second"):
        await agx.submit("acme", "ada", session, agent="support", prompt="Hello?")
    await _scrape(sidecar, {"agx_jobs_waiting": 2})

    successor = await _start_worker(redis_url, ledger)
    try:
        events = {session: await task for session, task in following.items()}
        outcomes = {session: bodies[-1]["body"]["outcome"] for session, bodies in events.items()}
        assert outcomes == {"shown": "completed", "stopped": "cancelled", "stored": "completed"}
        stored = store.open("acme", "ada", "stored")
        await stored.load()
        assert stored.get_user_prompt() == "Where is my order?"
        assert len(stored.msgs) == 2 * (STEPS + 1)
        assert stored.msgs[-1].text == "".join(WORDS)  # type: ignore[union-attr]

        seen = await _scrape(sidecar, {"agx_runs_total": 5, "agx_jobs_waiting": 0})
        assert seen.total("agx_runs_total", outcome="cancelled") == 1
        assert seen.total("agx_runs_started_total") == 5
        assert seen.total("agx_run_resumes_total") == 3
        assert seen.total("agx_run_recovery_seconds_count") == 3
        assert seen.total("agx_run_recovery_seconds_sum") > 3 * LEASE_TTL / 2
        assert seen.total("agx_job_wait_seconds_count") == 5
        assert seen.total("agx_job_attempts_exhausted_total") == 0
        bars = re.findall(r'class="kind (\w+ d\d)">([^<]+)<', await page())
        assert bars.count(("step d1", "attempt 2")) == 1
        assert "● resumed by another process (attempt 2)" in await _agx(redis_url, "tail", "acme/ada/shown")
    finally:
        successor.end(signal.SIGKILL)
        await database.dispose()


async def test_a_job_that_kills_its_workers_ends_alone(redis_url: str, sidecar: Replica, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    workers = [await _start_worker(redis_url, ledger) for _ in range(2)]
    following = [asyncio.create_task(_follow(f"good-{n}")) for n in range(GOOD)]
    poisoned = asyncio.create_task(_follow("poisoned"))
    for n in range(GOOD // 2):
        await agx.submit("acme", "ada", f"good-{n}", agent="support", prompt="Go")
    await agx.submit("acme", "ada", "poisoned", agent="poison", prompt="Go", max_attempts=3)
    for n in range(GOOD // 2, GOOD):
        await agx.submit("acme", "ada", f"good-{n}", agent="support", prompt="Go")
    ended = asyncio.gather(poisoned, *following)
    try:
        while not ended.done():
            for n, process in enumerate(workers):
                if process.ended:
                    workers[n] = await _start_worker(redis_url, ledger)
            await asyncio.wait({ended}, timeout=0.05)
        bad, *good = [events[-1]["body"]["outcome"] for events in await ended]
        assert (bad, good) == ("lost", ["completed"] * GOOD)
        error = (await poisoned)[-2]["body"]
        assert error["code"] == "attempts_exhausted"
        seen = await _scrape(sidecar, {"agx_runs_total": GOOD + 1})
        assert seen.total("agx_job_attempts_exhausted_total", agent="poison") == 1
        assert seen.total("agx_job_attempts_exhausted_total") == 1
    finally:
        for process in workers:
            process.end(signal.SIGKILL)
