"""`run(..., resume=NAME)`: a run that a web process started goes on in a worker when that process is killed or ends."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.durable_worker import STEPS, WORDS, Ledger, work
from support.forked import Forked
from support.started_run import start
from support.waiting import wait_until

import agx


class Site:
    """A process that starts a run, and a worker process."""

    def __init__(self, url: str, path: Path) -> None:
        self._url, self._path = url, path
        self.ledger = Ledger(path)
        self._processes: list[Forked] = []

    def start(self) -> Forked:
        """Start the process that starts a run."""
        return self._fork(start, 0)

    async def start_worker(self) -> None:
        process = self._fork(work)
        await wait_until(lambda: process.said == "ready\n", what=f"a worker: {process.said}")

    def _fork(self, main: Callable[..., None], *more: object) -> Forked:
        log = self._path.with_name(f"process-{len(self._processes)}.log")
        process = Forked(main, self._url, self._path, *more, log=log)
        self._processes.append(process)
        return process

    async def wait_for(self, line: str) -> None:
        await wait_until(lambda: line in [what for _, what in self.ledger.read()])

    def end(self) -> None:
        for process in self._processes:
            process.end(signal.SIGKILL)


@pytest.fixture
async def site(redis_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(redis_url, tmp_path / "ledger")
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=0.9, retention=60))
        try:
            yield site
        finally:
            site.end()
            await agx.aclose()


async def _follow() -> list[dict[str, Any]]:
    events = agx.listen("acme", "ada", "s", serialize=False, wait=60, timeout=60)
    return [event async for event in events]


async def _is_complete(events: list[dict[str, Any]]) -> None:
    bodies = [event["body"] for event in events]
    assert [body["seq"] for body in bodies] == list(range(len(bodies)))
    assert bodies[-1]["outcome"] == "completed"
    assert [event["body"]["attempt"] for event in events if event["type"] == "resume"] == [2]
    session = agx.RedisSession("acme", "ada", "s")
    await session.load()
    assert len(session.msgs) == 2 * (STEPS + 1)
    assert session.msgs[-1].text == "".join(WORDS)  # type: ignore[union-attr]


@pytest.mark.parametrize("point", ["model 0", "slow 1", "model 3"])
async def test_a_worker_completes_the_run_of_a_killed_service(site: Site, point: str) -> None:
    await site.start_worker()
    service = site.start()
    following = asyncio.create_task(_follow())
    await site.wait_for(point)
    service.send(signal.SIGKILL)
    await _is_complete(await following)


async def test_a_service_that_shuts_down_hands_its_run_over(site: Site) -> None:
    await site.start_worker()
    service = site.start()
    following = asyncio.create_task(_follow())
    await site.wait_for("slow 1")
    service.send(signal.SIGTERM)
    assert await asyncio.to_thread(service.wait) == 0
    await _is_complete(await following)
    # The interrupted call is made again, as its tool allows; nothing else is.
    assert {what for what, count in Counter(what for _, what in site.ledger.read()).items() if count > 1} == {"slow 1"}


async def test_a_run_without_resume_stores_nothing_to_resume_it(configured: Redis) -> None:
    agent = Agent(TestModel(custom_output_text="Hi"), deps_type=ScopeDeps)
    for resume in (None, "support"):
        await agx.run(FakeSession(), agent, "Hello", ScopeDeps(), resume=resume)
        fields = [set(fields) for _, fields in await configured.xrange("agx:1:1:s")]
        assert any(b"ck" in names for names in fields) == (resume is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"args": {"n": 1}},
        {"resume": "support", "args": {"n": object()}},
        {"resume": "support", "args": {"text": "x" * 65_536}},
    ],
    ids=["args without resume", "args that are not JSON", "args that are too large"],
)
async def test_wrong_arguments_touch_nothing(configured: Redis, options: dict[str, Any]) -> None:
    agent = Agent(TestModel(), deps_type=ScopeDeps)
    with pytest.raises(agx.JobError, match="args"):
        await agx.run(FakeSession(), agent, "Hello", ScopeDeps(), **options)
    assert not await configured.keys("agx:1:*")
