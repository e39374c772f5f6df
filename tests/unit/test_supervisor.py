"""The supervisor: work that raises is started again, counted, and logged once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from unittest.mock import patch

import pytest
from support.waiting import wait_until

from agx.redis import supervisor as module
from agx.redis.supervisor import Supervisor

NAME = "agx-test"


@pytest.fixture(autouse=True)
async def fast() -> AsyncIterator[None]:
    with patch.object(module, "_RESTART_FIRST", 0.001), patch.object(module, "_RESTART_LAST", 0.002):
        yield


async def test_work_that_raises_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, done, attempts = Supervisor(), asyncio.Event(), 0

    async def work() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            raise KeyError("unexpected")
        done.set()

    with caplog.at_level(logging.ERROR, logger="agx"):
        await supervisor.start(work, name=NAME)
    assert done.is_set()
    assert supervisor.failures == {NAME: 3}
    (record,) = caplog.records
    assert record.exc_info
    assert NAME in record.message


async def test_a_future_that_someone_else_cancelled_does_not_end_the_work() -> None:
    supervisor, attempts = Supervisor(), 0

    async def work() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    await supervisor.start(work, name=NAME)
    assert attempts == 2


@pytest.mark.parametrize("swallow", [False, True])
async def test_a_cancelled_task_ends(swallow: bool) -> None:
    supervisor, started = Supervisor(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if swallow:
                raise ValueError("in the place of the cancellation") from None
            raise

    task = supervisor.start(work, name=NAME)
    await started.wait()
    task.cancel()
    await wait_until(task.done)
    assert not supervisor.failures
    await asyncio.gather(task, return_exceptions=True)


async def test_a_callback_that_raises_is_counted() -> None:
    supervisor = Supervisor()

    def cancels() -> None:
        raise asyncio.CancelledError

    assert not supervisor.call(lambda: 1 // 0, name=NAME)
    assert not supervisor.call(cancels, name=NAME)
    assert supervisor.call(lambda: None, name=NAME)
    assert supervisor.failures == {NAME: 2}
