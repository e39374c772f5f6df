"""Many runs that stream at once, each with a listener, and what has to hold for all of them in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel

import agx

from .agents import FakeSession, ScopeDeps

PACE = 0.25  # seconds between two words of a run


class Streaming:
    """Many runs that talk until `finish()`, each with a listener; sessions `s0`, `s1`, ... of seven scopes."""

    def __init__(self, runs: int) -> None:
        self._count = runs
        self._finish = asyncio.Event()
        self.said: dict[str, list[str]] = {}
        self.delivered: dict[str, list[dict[str, Any]]] = {}
        self._runs: list[asyncio.Task[Any]] = []
        self._listeners: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for n in range(self._count):
            name = f"s{n}"
            said, delivered = self.said.setdefault(name, []), self.delivered.setdefault(name, [])
            deps = ScopeDeps(scope=f"t{n % 7}", session_id=name)
            self._runs.append(asyncio.create_task(agx.run(FakeSession(), self._agent(said), "Hi", deps=deps)))
            self._listeners.append(asyncio.create_task(self._listen(deps, delivered)))

    def _agent(self, said: list[str]) -> Agent[ScopeDeps, str]:
        async def speak(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
            while not self._finish.is_set():
                said.append(f"{len(said)} ")
                yield said[-1]
                await asyncio.sleep(PACE)

        return Agent(FunctionModel(stream_function=speak), deps_type=ScopeDeps, name="talker")

    async def _listen(self, deps: ScopeDeps, delivered: list[dict[str, Any]]) -> None:
        async for event in agx.listen(deps.scope, deps.user_id, deps.session_id, wait=30, serialize=False):
            delivered.append(event)  # noqa: PERF401 - the test looks at it meanwhile

    def all_heard(self, least: int) -> bool:
        """Whether each listener has so many events; raises what a run has raised."""
        self._raise_failures()
        return all(len(delivered) >= least for delivered in self.delivered.values())

    def have_heard_since(self, before: dict[str, int]) -> bool:
        """Whether every listener has received words that were said after that many; raises what a run has raised."""
        self._raise_failures()
        return all(
            any(int(text.split()[-1]) > before[name] + 1 for text in _texts(delivered[-50:]))
            for name, delivered in self.delivered.items()
        )

    def _raise_failures(self) -> None:
        for ended in (run for run in self._runs if run.done()):
            ended.result()

    async def finish(self) -> None:
        """End all runs; fails unless each is whole."""
        self._finish.set()
        for name, result in zip(self.said, await asyncio.gather(*self._runs), strict=True):
            assert result.output == "".join(self.said[name])
        await asyncio.gather(*self._listeners)
        for name, delivered in self.delivered.items():
            assert [event["body"]["seq"] for event in delivered] == list(range(len(delivered))), name
            assert delivered[-1]["body"]["outcome"] == "completed"
            assert "".join(_texts(delivered)) == "".join(self.said[name])

    async def replay(self) -> None:
        """Follow all streams from their start, after `finish()`; fails unless Redis has what the listeners got."""
        for n, name in enumerate(self.said):
            events = [event async for event in agx.listen(f"t{n % 7}", 1, name, serialize=False)]
            assert [event["body"]["seq"] for event in events] == list(range(len(events))), name
            assert "".join(_texts(events)) == "".join(self.said[name])


def _texts(events: list[dict[str, Any]]) -> list[str]:
    bodies = [event["body"] for event in events if "part_kind" in event["body"]]
    return [body.get("content_delta", body.get("content", "")) for body in bodies]
