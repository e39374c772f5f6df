"""A tool starts once the checkpoints before it are acknowledged, or after an outage; not because its process stood."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from agx.redis import retry
from agx.runs.recording.run_events import RunEvents
from agx.runs.state import RunState
from agx.stream.events import Runtime

TIMEOUT = 0.1  # seconds


class Writer:
    """Acknowledges everything once it is released."""

    def __init__(self) -> None:
        self.released = asyncio.Event()

    async def drain(self) -> None:
        await self.released.wait()


def make_events(monkeypatch: pytest.MonkeyPatch) -> tuple[RunEvents, Writer]:
    monkeypatch.setattr(retry, "COMMAND_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(retry, "_TICK", TIMEOUT / 18)
    events, writer = RunEvents(RunState(), Runtime()), Writer()
    events.writer = writer  # type: ignore[assignment]
    return events, writer


async def test_after_a_stop_of_its_process_it_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    events, writer = make_events(monkeypatch)
    loop = asyncio.get_running_loop()
    seen: list[Any] = []

    def stop_process() -> None:
        time.sleep(3 * TIMEOUT)
        loop.call_later(TIMEOUT / 2, answer)

    def answer() -> None:
        seen.append("answer")
        writer.released.set()

    loop.call_soon(stop_process)
    await events.wait_recorded()
    assert seen == ["answer"]


async def test_in_an_outage_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    events, writer = make_events(monkeypatch)
    await events.wait_recorded()
    assert not writer.released.is_set()
