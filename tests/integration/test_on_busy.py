"""`on_busy`: the table of docs/how-to/busy.md, each cell for `run()`, `submit()` and a router's run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, FunctionModel
from redis.asyncio import Redis
from support.agents import ScopeDeps, prompts
from support.waiting import wait_until

import agx
from agx.control.on_busy import MAX_QUEUED, OnBusy
from agx.engine.registry import current_engine
from agx.jobs.queue import Waiting
from agx.redis.keys import SessionKeys
from agx.redis.live_key import new_holder
from agx.redis_session import RedisSessions
from agx.testing import collect
from agx.web.runs import Runs, Who
from agx.web.turns import ask

KEYS = SessionKeys.of("agx", 1, 1, "s")
SIDES = ("run", "submit", "router")


@dataclass
class Scene:
    """An agent whose first answer waits, and the three ways to ask it."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    answered: list[str] = field(default_factory=list)  # the prompts, as they were answered
    asking: list[asyncio.Task[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.agent = Agent(FunctionModel(stream_function=self._answer), deps_type=ScopeDeps, name="support")

    async def _answer(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        prompt = prompts(messages)[-1]
        yield f"To {prompt}"
        self.reached.set()
        if prompt == "first":
            await self.open.wait()
        self.answered.append(prompt)

    def session(self) -> agx.RedisSession:
        return agx.RedisSession(1, 1, "s")

    async def ask(self, side: str, prompt: str, on_busy: OnBusy) -> Any:
        """Ask, and return what the caller gets, as soon as it gets it."""
        if side == "submit":
            return await agx.submit(1, 1, "s", agent="support", prompt=prompt, on_busy=on_busy)
        if side == "run":
            return await agx.run(self.session(), self.agent, prompt, ScopeDeps(), on_busy=on_busy)
        runs = Runs(self.agent, RedisSessions(), lambda *ids: ScopeDeps(), {})
        return await runs.start(Who(1, 1), "s", ask(prompt), on_busy)

    def begin(self, *asked: Any) -> asyncio.Task[Any]:
        self.asking.append(asyncio.create_task(self.ask(*asked)))
        return self.asking[-1]

    async def first(self) -> str:
        """Begin a run that stays live; returns its id."""
        self.begin("run", "first", "reject")
        await self.reached.wait()
        begin = (await current_engine().control.execute("XRANGE", KEYS.stream, "-", "+", "COUNT", 1))[0][1]
        run_id: str = orjson.loads(begin[b"body"])["run_id"]
        return run_id

    async def conversation(self) -> list[ModelMessage]:
        session = self.session()
        await session.load()
        return session.msgs


@pytest.fixture
async def scene(configured: Redis) -> AsyncIterator[Scene]:
    scene = Scene()

    async def recipe(job: agx.Job) -> agx.Call:
        return agx.Call(scene.session(), scene.agent, ScopeDeps())

    worker = agx.Worker({"support": recipe})
    working = asyncio.create_task(worker.run())
    yield scene
    scene.open.set()
    await asyncio.gather(*scene.asking, return_exceptions=True)
    worker.stop()
    await working


async def is_waiting() -> bool:
    """Return whether a run waits for the session, in this process or in the queue."""
    engine = current_engine()
    assert engine.queues.partitions is not None
    queued = [await engine.control.execute("XLEN", f"agx::jobs:{n}") for n in range(engine.queues.partitions)]
    return bool(engine.lines.get(KEYS.stream)) or any(queued)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("on_busy", ["reject", "enqueue", "interrupt", "steer"])
async def test_nothing_runs(scene: Scene, side: str, on_busy: OnBusy) -> None:
    await scene.ask(side, "second", on_busy)
    await wait_until(lambda: scene.answered == ["second"])


@pytest.mark.parametrize("side", SIDES)
async def test_reject(scene: Scene, side: str) -> None:
    await scene.first()
    with pytest.raises(agx.SessionBusyError):
        await scene.ask(side, "second", "reject")
    scene.open.set()
    await scene.asking[0]
    assert scene.answered == ["first"]


@pytest.mark.parametrize("side", SIDES)
async def test_enqueue(scene: Scene, side: str) -> None:
    await scene.first()
    for prompt in ("second", "third", "fourth"):
        asked = scene.begin(side, prompt, "enqueue")
        if side == "submit":
            await asked  # it returns at once: else nothing gives the submits an order
    await wait_until(is_waiting)
    scene.open.set()
    await wait_until(lambda: scene.answered == ["first", "second", "third", "fourth"])
    await asyncio.gather(*scene.asking)
    await wait_until(lambda: prompts_of(scene, ["first", "second", "third", "fourth"]))


@pytest.mark.parametrize("side", SIDES)
async def test_interrupt(scene: Scene, side: str) -> None:
    await scene.first()
    waits = scene.begin("run", "third", "enqueue")
    await wait_until(is_waiting)
    await asyncio.gather(scene.begin(side, "second", "interrupt"), waits)
    with pytest.raises(agx.AgxCanceledError):
        await scene.asking[0]
    # A job comes from another process: no order holds between it and what waits here.
    expected = ["second", "third"]
    await wait_until(lambda: (sorted(scene.answered) if side == "submit" else scene.answered) == expected)
    await wait_until(lambda: prompts_of(scene, ["first", *scene.answered]))
    partial = (await scene.conversation())[1]
    assert isinstance(partial, ModelResponse)
    assert (partial.text, partial.state) == ("To first", "interrupted")


@pytest.mark.parametrize("side", SIDES)
async def test_steer(scene: Scene, side: str) -> None:
    live = await scene.first()
    if side == "run":
        with pytest.raises(agx.SteeredError) as raised:
            await scene.ask(side, "second", "steer")
        assert raised.value.run_id == live
    else:
        assert await scene.ask(side, "second", "steer") == live
    scene.open.set()
    await scene.asking[0]
    assert scene.answered == ["first", "second"]
    ids = {event["body"]["run_id"] for event in await collect(1, 1, "s") if event["type"] == "begin"}
    assert ids == {live}


@pytest.mark.parametrize("side", SIDES)
async def test_steer_where_the_run_is_over_but_not_stored(scene: Scene, side: str, monkeypatch: Any) -> None:
    saving, may_save, save = asyncio.Event(), asyncio.Event(), agx.RedisSession.save

    async def slow_save(session: agx.RedisSession) -> None:
        saving.set()
        await may_save.wait()
        await save(session)

    scene.open.set()
    with monkeypatch.context() as patch:
        patch.setattr(agx.RedisSession, "save", slow_save)
        await scene.first()
        await saving.wait()
        asked = scene.begin(side, "second", "steer")
        await wait_until(is_waiting)
        may_save.set()
        await scene.asking[0]
    await asked
    await wait_until(lambda: scene.answered == ["first", "second"])


@pytest.mark.parametrize("on_busy", ["enqueue", "interrupt", "steer"])
@pytest.mark.parametrize("side", SIDES)
async def test_a_run_whose_process_died(scene: Scene, side: str, on_busy: OnBusy) -> None:
    """The run after it begins when the dead one has ended, however long that takes."""
    engine = current_engine()
    await engine.ready()
    begin = orjson.dumps({"run_id": "dead", "agent": "other", "recover": 60, "max_attempts": 3, "seq": 0})
    fields = {"type": "begin", "origin": "opale", "body": begin}
    await engine.control.execute("XADD", KEYS.stream, "*", *[part for pair in fields.items() for part in pair])
    await engine.control.execute("EXPIRE", KEYS.stream, 60)
    with pytest.raises(agx.SessionBusyError):
        await scene.ask(side, "second", "reject")
    asked = scene.begin(side, "second", on_busy)
    if on_busy == "steer":
        if side == "run":
            with pytest.raises(agx.SteeredError):
                await asked
        else:
            assert await asked == "dead"
        await engine.control.execute("DEL", KEYS.inbox)
        return
    await wait_until(is_waiting)
    assert scene.answered == []
    await engine.control.execute("SET", KEYS.live, new_holder("dead", 2), "PX", 100)  # another process has resumed it
    ended = {"type": "end", "origin": "opale", "body": '{"run_id": "dead", "outcome": "completed", "seq": 1}'}
    await engine.control.execute("XADD", KEYS.stream, "*", *[part for pair in ended.items() for part in pair])
    await wait_until(lambda: scene.answered == ["second"])
    await asked


@pytest.mark.parametrize("side", SIDES)
async def test_a_queue_has_a_depth(scene: Scene, side: str) -> None:
    await scene.first()
    for n in range(MAX_QUEUED):
        asked = scene.begin(side, f"{n}", "enqueue")
        if side == "submit":
            await asked
        else:
            await wait_until(lambda n=n: len(current_engine().lines.get(KEYS.stream, ())) > n)  # type: ignore[misc]
    with pytest.raises(agx.QueueFullError, match="'s'"):
        await scene.ask(side, "one more", "enqueue")
    scene.open.set()
    await wait_until(lambda: scene.answered == ["first", *(f"{n}" for n in range(MAX_QUEUED))])


@pytest.mark.parametrize("side", SIDES)
async def test_an_unknown_word_is_refused(scene: Scene, side: str) -> None:
    with pytest.raises(agx.JobError, match="on_busy must be one of reject, enqueue, interrupt, steer, not 'wait'"):
        await scene.ask(side, "second", "wait")  # type: ignore[arg-type]


async def test_a_shutdown_ends_the_wait(configured: Redis) -> None:
    scene = Scene()
    await scene.first()
    waits = scene.begin("run", "second", "enqueue")
    await wait_until(is_waiting)
    await agx.aclose()
    with pytest.raises((agx.SessionBusyError, agx.RedisUnavailableError)):
        await waits
    with pytest.raises(agx.AgxCanceledError):
        await scene.asking[0]


async def test_a_caller_that_stops_waiting_leaves_the_line(scene: Scene) -> None:
    await scene.first()
    waits = scene.begin("run", "second", "enqueue")
    scene.begin("run", "third", "enqueue")
    await wait_until(lambda: len(current_engine().lines.get(KEYS.stream, ())) == 2)
    waits.cancel()
    scene.open.set()
    await wait_until(lambda: scene.answered == ["first", "third"])


def test_only_the_oldest_due_job_of_a_session_is_picked() -> None:
    async def recipe(job: agx.Job) -> agx.Call:
        raise NotImplementedError

    worker = agx.Worker({"support": recipe})

    def job(entry_id: str, session: str, agent: str = "support", due_ms: int = 0, scope: str = "acme") -> Waiting:
        return Waiting(0, entry_id, scope, agent, due_ms, session)

    async def pick(*waiting: Waiting) -> list[str]:
        return sorted(job.entry_id for job in worker._pick(list(waiting), now_ms=100))

    jobs = [
        job("1", "a:s", due_ms=200),  # later
        job("2", "a:s"),
        job("3", "a:s"),
        job("4", "a:t", agent="other"),  # another worker's
        job("5", "a:t"),
        job("6", "a:s", scope="other"),
        *(job(f"7{n}", "") for n in range(2)),  # of an earlier version
    ]
    assert asyncio.run(pick(*jobs)) == ["2", "6", "70", "71"]


async def prompts_of(scene: Scene, expected: list[str]) -> bool:
    return prompts(await scene.conversation()) == expected
