"""Scenes with user input while workers and servers are killed: messages to live runs, and queued prompts."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from redis.asyncio import Redis
from support.agents import ScopeDeps
from support.durable_worker import make_recipe
from support.forked import Forked
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer

from .verdict import SETTLE, Verdict

_LEASE_TTL = 2.0  # seconds
_WORKERS = 4
_AT_A_TIME = 20  # runs
_STEERS = 5  # messages of a run
_QUEUED = 10  # prompts of a session
_RUNS_PER_KILL = 10
_FULL = 60.0  # seconds of a scene from which on it has the numbers of the full table
_PATIENCE = 120.0  # seconds for one run
_SCOPE, _USER, _FIRST = "asked", "u", "Go"

Prompts = list[str]


@dataclass
class Fleet:
    """A server that keeps its data, and workers."""

    server: EmbeddedServer
    home: Path
    workers: list[Forked]
    started: int = 0

    def start_worker(self) -> None:
        self.started += 1
        self.workers.append(Forked(_serve, self.server.url, log=self.home / f"w{self.started}.log"))

    async def kill_worker(self, chance: Random) -> None:
        """Kill a worker, and start another in its place, as an orchestrator does."""
        worker = self.workers.pop(chance.randrange(len(self.workers)))
        await asyncio.to_thread(worker.end, signal.SIGKILL)
        self.start_worker()

    async def restart_server(self) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)


@asynccontextmanager
async def _running_fleet(home: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        (data := home / "data").mkdir()
        server = stack.enter_context(EmbeddedServer(directory=data))
        client = await stack.enter_async_context(Redis.from_url(server.url))
        agx.configure(agx.Config(redis=client, lease_ttl=_LEASE_TTL))
        stack.push_async_callback(agx.aclose)
        fleet = Fleet(server, home, [])
        for _ in range(_WORKERS):
            fleet.start_worker()
        try:
            yield fleet
        finally:
            for worker in fleet.workers:
                await asyncio.to_thread(worker.end)


@dataclass(frozen=True)
class SteeredScene:
    """200 runs with five messages each, while one worker is killed for every ten runs."""

    name: str = "steered: workers killed"
    weight: float = 1.0
    least: float = 3.0  # seconds
    in_short: bool = True
    runs: int = 200

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Steer every run, kill, and compare each conversation with what was sent."""
        verdict, chance = Verdict(self.name), Random(f"{seed}/{self.name}")
        runs = max(_RUNS_PER_KILL, int(self.runs * min(1.0, seconds / _FULL)))
        slots, begun, waits = asyncio.Semaphore(_AT_A_TIME), asyncio.Queue[str](), list[float]()

        async def play_run(session: str) -> None:
            async with slots:
                await _play_run(verdict, session, begun, waits, Random(f"{seed}/{session}"))

        async with _running_fleet(home) as fleet, asyncio.TaskGroup() as group:
            playing = [group.create_task(play_run(f"s{n}")) for n in range(runs)]
            for n in range(runs):
                await begun.get()
                if n % _RUNS_PER_KILL == _RUNS_PER_KILL // 2:
                    verdict.faults["SIGKILL of a worker"] += 1
                    await fleet.kill_worker(chance)
            await asyncio.wait(playing)
        waits.sort()
        shown = f"p50 {waits[len(waits) // 2]:.2f} s, p95 {waits[int(len(waits) * 0.95)]:.2f} s, max {waits[-1]:.2f} s"
        verdict.times.append(f"{len(waits)} messages, taken after {shown}")
        return verdict


async def _play_run(
    verdict: Verdict, session: str, begun: asyncio.Queue[str], waits: list[float], chance: Random
) -> None:
    sent: dict[str, float] = {}
    prompts = [f"{session} message {n}" for n in range(_STEERS)]
    await agx.submit(_SCOPE, _USER, session, agent="steered", prompt=_FIRST, run_id=session)
    steering = asyncio.create_task(_steer(session, prompts, sent, chance))
    outcome = "none"
    listening = agx.listen(_SCOPE, _USER, session, wait=_PATIENCE, timeout=_PATIENCE, serialize=False)
    async for event in listening:
        body = event["body"]
        if event["type"] == "begin":
            begun.put_nowait(session)
        elif body.get("steer"):
            waits.append(time.monotonic() - sent[body["prompt"]])
        elif event["type"] == "end":
            outcome = body["outcome"]
    steering.cancel()
    await asyncio.gather(steering, return_exceptions=True)
    verdict.outcomes[outcome] += 1
    stored, _ = await _read(session)
    if outcome != "completed" or stored != [_FIRST, *prompts]:
        verdict.broken.append(f"{session}: {outcome}, its conversation has {stored}")


async def _steer(session: str, prompts: Prompts, sent: dict[str, float], chance: Random) -> None:
    for n, prompt in enumerate(prompts):
        await asyncio.sleep(chance.uniform(0, 0.3))

        async def steer(prompt: str = prompt, key: str = f"k{n}") -> bool:
            sent[prompt] = time.monotonic()
            return await agx.steer(_SCOPE, _USER, session, prompt, key=key)

        await _until_done(steer)


async def _until_done(attempt: Callable[[], Awaitable[object]]) -> None:
    """Repeat until the run has begun, and Redis answers."""
    while True:
        try:
            if await attempt():
                return
        except agx.RedisUnavailableError:
            pass
        await asyncio.sleep(0.02)


@dataclass(frozen=True)
class QueuedScene:
    """Ten prompts wait for each session, while a worker is killed and the server is restarted."""

    name: str = "queued: worker and server killed"
    weight: float = 0.5
    least: float = 3.0  # seconds
    in_short: bool = True
    sessions: int = 20

    async def play(self, seconds: float, seed: int, home: Path) -> Verdict:
        """Queue, kill, restart, and compare each conversation with what was asked."""
        verdict, chance = Verdict(self.name), Random(f"{seed}/{self.name}")
        sessions = [f"q{n}" for n in range(max(1, int(self.sessions * min(1.0, seconds / _FULL))))]
        async with _running_fleet(home) as fleet:
            async with asyncio.TaskGroup() as group:
                for session in sessions:
                    group.create_task(_queue(session))
                await _wait_for_answers(sessions[0], 2)
                verdict.faults["SIGKILL of a worker"] += 1
                await fleet.kill_worker(chance)
                await _wait_for_answers(sessions[0], 5)
                verdict.faults["server killed and restarted"] += 1
                await fleet.restart_server()
            started = time.monotonic()
            for session in sessions:
                with contextlib.suppress(AssertionError):  # what is missing is found below
                    await _wait_for_answers(session, _QUEUED)
                prompts, answers = await _read(session)
                verdict.outcomes["completed"] += len(answers)
                expected = _prompts_of(session)
                if prompts != expected or answers != [f"You asked {prompt}" for prompt in expected]:
                    verdict.broken.append(f"{session}: its conversation has {prompts} and {answers}")
            verdict.times.append(f"the last answer came {time.monotonic() - started:.1f} s after the restart")
        return verdict


def _prompts_of(session: str) -> Prompts:
    return [f"{session} prompt {n}" for n in range(_QUEUED)]


async def _queue(session: str) -> None:
    for n, prompt in enumerate(_prompts_of(session)):

        async def submit(prompt: str = prompt, run_id: str = f"{session}-{n}") -> str:
            return await agx.submit(
                _SCOPE, _USER, session, agent="queued", prompt=prompt, run_id=run_id, on_busy="enqueue"
            )

        await _until_done(submit)


async def _wait_for_answers(session: str, count: int) -> None:
    async def read_all() -> list[str] | None:
        with contextlib.suppress(agx.RedisUnavailableError):
            answers = (await _read(session))[1]
            return answers if len(answers) >= count else None
        return None

    await wait_until(read_all, timeout=2 * SETTLE, what=f"{count} answers of {session}")


async def _read(session: str) -> tuple[Prompts, list[str]]:
    """Return the prompts of the stored conversation, and the answers that are texts."""
    stored = agx.RedisSession(_SCOPE, _USER, session)
    await stored.load()
    texts = [message.text for message in stored.msgs if isinstance(message, ModelResponse) and message.text]
    return _prompts_in(stored.msgs), texts


def _prompts_in(messages: list[ModelMessage]) -> Prompts:
    return [
        str(part.content)
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]


# --- the workers ---


def _serve(url: str) -> None:
    asyncio.run(_work(url))


async def _work(url: str) -> None:
    async with Redis.from_url(url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=_LEASE_TTL))
        agents = {"steered": _make_agent(_answer_all), "queued": _make_agent(_answer_one)}
        await agx.Worker({name: make_recipe(agent) for name, agent in agents.items()}, _AT_A_TIME).run()
        await agx.aclose()


Answer = Callable[[list[ModelMessage], AgentInfo], AsyncIterator[str | DeltaToolCalls]]


def _make_agent(answer: Answer) -> Agent[ScopeDeps, str]:
    agent = Agent(FunctionModel(stream_function=answer), deps_type=ScopeDeps)

    @agent.tool_plain(metadata={"on_resume": "retry"})
    async def work() -> str:
        await asyncio.sleep(0.05)
        return "worked"

    return agent


async def _answer_all(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """Work until all messages have come."""
    await asyncio.sleep(0.05)
    if len(_prompts_in(messages)) <= _STEERS:
        yield {0: DeltaToolCall("work", "{}", tool_call_id=f"c{len(messages)}")}
    else:
        yield "Done"


async def _answer_one(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """Work once, then name the prompt."""
    await asyncio.sleep(0.05)
    if isinstance(messages[-1], ModelRequest) and any(isinstance(part, UserPromptPart) for part in messages[-1].parts):
        yield {0: DeltaToolCall("work", "{}", tool_call_id=f"c{len(messages)}")}
    else:
        yield f"You asked {_prompts_in(messages)[-1]}"


SCENES = (SteeredScene(), QueuedScene())
