"""A run ends whatever is raised or cancelled: the caller gets its exception, listeners `end`, operators the fact."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import anyio
import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent, call, scripted
from support.proxy import Proxy
from support.recorded import Recorded, read_facts, read_recorded
from support.sdk import installed_sdk
from support.waiting import wait_until

import agx
from agx.embedded.server import EmbeddedServer
from agx.engine.process_heartbeat import ProcessHeartbeat
from agx.engine.registry import current_engine
from agx.facts import schema as facts
from agx.facts.decoding import decode
from agx.facts.queues import Queues
from agx.redis.bus import NodeBus
from agx.runs import opening
from agx.runs.recording.recorder import Recorder
from agx.stream.events import Runtime
from agx.stream.subscription import Subscription
from agx.stream.writer import SessionWriter
from agx.telemetry.tracing import RunSpan


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=5))
        yield client
        await agx.aclose()


async def check_ended(redis: Redis, outcome: str, error_type: str | None = None) -> Recorded:
    """Fail unless the run has one `end` and one last fact, and the next run can begin at once."""
    recorded = await read_recorded(redis)
    types = [event.type for event in recorded.entries]
    assert (types.count("begin"), types.count("end"), types[-1]) == (1, 1, "end")
    assert recorded.entries[-1].body["outcome"] == outcome
    ended = recorded.one(facts.RunEnded)
    assert (ended.outcome, ended.error_type) == (outcome, error_type)
    assert not current_engine().runs
    assert not await redis.exists("agx:1:1:s:live")
    assert (await agx.run(FakeSession(), ScriptedAgent().agent(), "Again", deps=ScopeDeps())).output == "one two three"
    return recorded


def named(error: type[BaseException]) -> str:
    return f"{error.__module__}.{error.__qualname__}"


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("way", ["run", "capability"])
async def test_an_exception_without_a_text(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, way: str, capture: bool
) -> None:
    if capture:
        monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    error = MuteError()
    stage = ScriptedAgent(model_error=error)
    agent = stage.agent(capabilities=[agx.AgxCapability()])
    driven = (
        agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps()) if way == "run" else agent.run("Hi", deps=ScopeDeps())
    )
    with pytest.raises(MuteError) as caught:
        await driven
    assert caught.value is error
    await check_ended(redis, "failed", named(MuteError))


LONE = "bad\ud83d"


@pytest.mark.parametrize("where", ["tool name", "call id", "agent name", "message"])
async def test_a_lone_surrogate(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    caplog.set_level(logging.CRITICAL, logger="agx")  # pytest-xdist can't pass the text on
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    tool, call_id = (LONE if where == "tool name" else "work"), (LONE if where == "call id" else "c1")
    replies: list[Any] = [call(tool, "{}", call_id=call_id), ["done"]]
    if where == "message":
        replies = [[ValueError(LONE)]]
    name = LONE if where == "agent name" else "staged"
    agent: Agent[ScopeDeps, str] = Agent(scripted(*replies), deps_type=ScopeDeps, name=name)

    @agent.tool_plain
    def work() -> str:
        return "worked"

    with installed_sdk() as spans, suppress(ValueError):
        await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps())
    failed = where == "message"
    recorded = await check_ended(redis, "failed" if failed else "completed", "ValueError" if failed else None)
    if where == "tool name":
        assert [fact.tool for fact in recorded.of(facts.ToolEnded)] == ["bad?"]
    if where == "agent name":
        assert recorded.one(facts.RunEnded).agent == "bad?"
        assert spans.one("agx.run").name == "agx.run bad?"
    if failed:
        assert recorded.one(facts.RunEnded).error_message == "bad?"


@pytest.mark.parametrize(
    "follows", ["garbage", 7, b"\xff", object(), LONE], ids=["text", "int", "bytes", "object", "surrogate"]
)
async def test_follows_that_is_no_traceparent(redis: Redis, follows: Any) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps(follows=follows))
    recorded = await check_ended(redis, "completed")
    assert recorded.one(facts.RunStarted).follows is None


class FailingProcessor(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        if span.name.startswith("agx."):
            raise MuteError


async def test_a_span_processor_that_raises(redis: Redis) -> None:
    with installed_sdk():
        otel.get_tracer_provider().add_span_processor(FailingProcessor())  # type: ignore[attr-defined] # it is the SDK's
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    await check_ended(redis, "completed")


def test_a_fact_that_json_cannot_hold_is_repaired() -> None:
    trace = facts.Trace("0" * 31 + "1", "0" * 15 + "1", None, True, False)
    fact = facts.RunStarted(
        id="r:start", scope="1", user=LONE, session=None, run_id="r", agent="a", service=facts.Service(LONE),
        trace=trace, start_ns=10**400,
    )  # fmt: skip
    decoded = decode(facts.encode(fact))
    assert isinstance(decoded, facts.RunStarted)
    assert (decoded.user, decoded.service.name, decoded.start_ns) == ("bad?", "bad?", 2**63 - 1)


# --- a failure at each step ---


@contextmanager
def failing_once(owner: Any, name: str) -> Iterator[list[None]]:
    original, raised = getattr(owner, name), list[None]()

    def fail(*args: Any, **kwargs: Any) -> Any:
        if not raised:
            raised.append(None)
            raise LookupError("injected")
        return original(*args, **kwargs)

    with patch.object(owner, name, fail):
        yield raised


@pytest.mark.parametrize("name", ["_note_partial", "end_node", "_put_result", "_log_failure"])
async def test_a_failing_step_of_the_end(redis: Redis, name: str) -> None:
    stage = ScriptedAgent(model_error=ArithmeticError("the agent's own"))
    agent = stage.agent()
    finish, failing = Recorder.finish, list[Any]()

    def finish_failing(recorder: Recorder, ending: Any) -> None:
        with failing_once(Recorder, name) as raised:
            finish(recorder, ending)
        failing.append(raised)

    with patch.object(Recorder, "finish", finish_failing), pytest.raises(ArithmeticError):
        await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps())
    assert failing == [[None]]
    await check_ended(redis, "failed", "ArithmeticError")


@pytest.mark.parametrize(("owner", "name", "streams"), [(Runtime, "convert", True), (Recorder, "end_model", False)])
async def test_a_failing_record_of_an_answer(redis: Redis, owner: type, name: str, streams: bool) -> None:
    agent = ScriptedAgent(call_tool=True, streams=streams).agent()
    with failing_once(owner, name) as raised:
        result = await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps())
    assert raised
    assert result.output == "one two three"
    await check_ended(redis, "completed")


@pytest.mark.parametrize(("owner", "name"), [(RunSpan, "end"), (Queues, "put_acknowledged"), (SessionWriter, "drain")])
async def test_a_failing_report(redis: Redis, owner: type, name: str) -> None:
    """The fact is missing: the deadline stays, so that a sidecar finishes the run. All else is as always."""
    with failing_once(owner, name) as raised:
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    assert raised
    await wait_until(lambda: _has_end(redis))
    assert not await redis.exists("agx:1:1:s:live")
    assert sum([await redis.zcard(f"agx::leases:{n}") for n in range(8)]) == 1
    assert (await agx.run(FakeSession(), ScriptedAgent().agent(), "Again", deps=ScopeDeps())).output == "one two three"


async def _has_end(redis: Redis) -> bool:
    return [event.type for event in (await read_recorded(redis)).entries][-1] == "end"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (opening, "start_run"),
        (opening, "SessionWriter"),
        (SessionWriter, "begin"),
        (Recorder, "emit_start"),
        (ProcessHeartbeat, "start"),
        (Subscription, "subscribe"),
    ],
)
async def test_a_failing_step_of_opening(redis: Redis, owner: Any, name: str) -> None:
    with failing_once(owner, name), pytest.raises(LookupError, match="injected"):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    types = [event.type for event in (await read_recorded(redis)).entries]
    assert types in ([], ["begin", "error", "end"])
    assert not current_engine().runs
    assert not await redis.exists("agx:1:1:s:live")
    assert (await agx.run(FakeSession(), ScriptedAgent().agent(), "Again", deps=ScopeDeps())).output == "one two three"


# --- cancelled at each command ---


@pytest.mark.parametrize("by", ["task", "anyio"])
@pytest.mark.parametrize("nth", range(1, 19))
async def test_cancelled_at_each_command(redis: Redis, by: str, nth: int) -> None:
    await current_engine().ready()
    issue, issued = NodeBus._issue, 0

    async def run(scope: anyio.CancelScope) -> None:
        with scope:
            await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())

    scope = anyio.CancelScope()
    running = asyncio.create_task(run(scope))

    def issue_and_cancel(bus: NodeBus, *args: Any) -> Any:
        nonlocal issued
        issued += 1
        if issued == nth:
            asyncio.get_running_loop().call_soon(scope.cancel if by == "anyio" else running.cancel)
        return issue(bus, *args)

    with patch.object(NodeBus, "_issue", issue_and_cancel):
        await asyncio.wait({running})
    assert (await agx.run(FakeSession(), ScriptedAgent().agent(), "Again", deps=ScopeDeps())).output == "one two three"
    by_run: dict[str, list[str]] = {}
    for fact in (await read_recorded(redis)).of(facts.RunFact):
        by_run.setdefault(fact.run_id, []).append(fact.id.split(":")[1])
    for ids in by_run.values():
        assert (ids.count("start"), ids.count("end")) == (1, 1)
    assert not current_engine().runs
    assert not await redis.exists("agx:1:1:s:live")


async def test_a_cancellation_of_anyio_does_not_spin(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnyIO cancels again at each turn of the loop, as long as the task waits without AnyIO's shield."""
    session = FakeSession(may_save=asyncio.Event())

    async def run(scope: anyio.CancelScope) -> None:
        with scope:
            await agx.run(session, ScriptedAgent().agent(), "Hi", deps=ScopeDeps())

    scope = anyio.CancelScope()
    running = asyncio.create_task(run(scope))
    await session.saving.wait()
    scope.cancel()
    loop, turns, callbacks = asyncio.get_running_loop(), 200, 0
    call_soon = loop.call_soon

    def count(*args: Any, **kwargs: Any) -> asyncio.Handle:
        nonlocal callbacks
        callbacks += 1
        return call_soon(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon", count)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert turns <= callbacks < 1.5 * turns  # this task's own, and hardly more
    assert not running.done()
    assert session.may_save is not None
    session.may_save.set()
    await running
    await check_ended(redis, "completed")


@pytest.mark.parametrize("way", ["run", "capability"])
async def test_a_cancelled_error_that_nobody_asked_for_is_a_failure(redis: Redis, way: str) -> None:
    raised: list[BaseException] = []

    async def fail() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    agent: Agent[ScopeDeps, str] = Agent(
        scripted(call("work", "{}"), ["done"]),
        deps_type=ScopeDeps,
        capabilities=[agx.AgxCapability()] if way == "capability" else [],
    )

    @agent.tool_plain
    async def work() -> None:
        try:
            await fail()
        except asyncio.CancelledError as error:
            raised.append(error)
            raise

    async def drive() -> None:
        if way == "run":
            await agx.run(FakeSession(), agent, "Hi", deps=ScopeDeps())
        else:
            await agent.run("Hi", deps=ScopeDeps())

    with pytest.raises(asyncio.CancelledError):
        await drive()
    assert raised
    await check_ended(redis, "failed", "asyncio.exceptions.CancelledError")


# --- without a session, nothing waits for Redis ---


@pytest.mark.parametrize("trouble", ["refuse", "freeze"])
async def test_an_observed_run_does_not_wait_for_redis(trouble: str) -> None:
    with EmbeddedServer() as server:
        async with Proxy(server.port) as proxy, Redis.from_url(proxy.url) as client:
            agx.configure(agx.Config(redis=client, lease_ttl=1))
            getattr(proxy, trouble)()
            agent = Agent(TestModel(), name="free", capabilities=[agx.AgxCapability()])
            for _ in range(3):
                running = asyncio.create_task(agent.run("Hi"))
                for _ in range(2_000):  # passes of the loop, in which no command can time out
                    await asyncio.sleep(0)
                assert running.done()
            proxy.accept()
            proxy.thaw()

            async def has_facts() -> bool:
                async with Redis.from_url(server.url) as direct:
                    ended = [fact for fact in await read_facts(direct) if isinstance(fact, facts.RunEnded)]
                return len(ended) == 3

            await wait_until(has_facts)
            await agx.aclose()
