"""Real runs of a real agent beside the made-up ones, and what their caller saw of each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.recorded import read_facts

import agx
from agx.facts.schema import Fact, RunEnded

SCOPE = "real"
_AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """One run for its caller: how it ended, and his own clock before and after, in ns."""

    session: str
    outcome: str
    before_ns: int
    after_ns: int


def play(url: str, numbers: Iterable[int]) -> list[Seen]:
    """Run agents, a third of them cancelled and a third failing, and wait for all."""
    return asyncio.run(_play(url, list(numbers)))


async def _play(url: str, numbers: list[int]) -> list[Seen]:
    async with Redis.from_url(url) as client:
        agx.configure(agx.Config(redis=client, service_name="audited"))
        seen: list[Seen] = []
        try:
            for first in range(0, len(numbers), _AT_A_TIME):
                seen += await asyncio.gather(*(_play_one(n) for n in numbers[first : first + _AT_A_TIME]))
        finally:
            await agx.aclose()
        return seen


async def _play_one(n: int) -> Seen:
    stages = (
        ScriptedAgent(),
        ScriptedAgent(hold_after=1),
        ScriptedAgent(model_error=LookupError("made")),
        ScriptedAgent(call_tool=True),
        ScriptedAgent(call_tool=True, hold_tool=True),
        ScriptedAgent(call_tool=True, tool_error=ArithmeticError("made")),
    )
    stage, session = stages[n % 6], f"s{n}"
    deps = ScopeDeps(scope=SCOPE, session_id=session)
    before = time.time_ns()
    running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Go on.", deps=deps))
    if n % 3 == 1:
        await stage.reached.wait()
        await agx.cancel(SCOPE, 1, session)
    try:
        await running
        outcome = "completed"
    except agx.AgxCanceledError:
        outcome = "cancelled"
    except (LookupError, ArithmeticError):
        outcome = "failed"
    return Seen(session, outcome, before, time.time_ns())


def read_queues(url: str) -> list[Fact]:
    """Return every fact in the queues."""

    async def read() -> list[Fact]:
        async with Redis.from_url(url) as client:
            return await read_facts(client)

    return asyncio.run(read())


def contradictions(seen: list[Seen], told: list[Fact]) -> list[str]:
    """Return where what the runtime told of its runs is not what their callers saw."""
    ends = {fact.session: fact for fact in told if isinstance(fact, RunEnded) and fact.scope == SCOPE}
    found = []
    for one in seen:
        end = ends.pop(one.session or "", None)
        if end is None:
            found.append(f"{one.session}: {one.outcome}, and no run.end")
        elif end.outcome != one.outcome:
            found.append(f"{one.session}: {one.outcome} for its caller, {end.outcome} in its fact")
        elif not one.before_ns <= end.start_ns <= end.end_ns <= one.after_ns:
            found.append(f"{one.session}: from {end.start_ns} to {end.end_ns}, which its caller did not see")
    found += [f"{session}: told, and nobody had called it" for session in ends]
    repeated = [each for each, count in Counter(one.session for one in seen).items() if count > 1]
    return found + [f"{session}: played twice" for session in repeated]
