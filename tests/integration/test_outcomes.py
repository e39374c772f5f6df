"""Every outcome by every way out: one begin, one end, one run.end, spans ended once, the lease gone, keys expiring."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
from pydantic_ai import ModelRetry
from pydantic_ai.exceptions import RunCancelled, RunTimedOut, UnexpectedModelBehavior
from pydantic_ai.messages import ModelResponse
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.recorded import Recorded, read_recorded
from support.sdk import SpanLedger, installed_sdk
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.facts import schema as facts
from agx.runs.lifecycle import RunLifecycle


@dataclass
class Scene:
    """One run on its way out."""

    redis: Redis
    stage: ScriptedAgent = field(default_factory=ScriptedAgent)
    session: FakeSession = field(default_factory=FakeSession)
    kwargs: dict[str, Any] = field(default_factory=dict)
    agent_kwargs: dict[str, Any] = field(default_factory=dict)

    def start(self) -> asyncio.Task[Any]:
        agent = self.stage.agent(**self.agent_kwargs)
        return asyncio.create_task(agx.run(self.session, agent, "Hello", deps=ScopeDeps(), **self.kwargs))

    async def start_and_reach(self) -> asyncio.Task[Any]:
        task = self.start()
        await self.stage.reached.wait()
        return task


@dataclass(frozen=True)
class Way:
    """A way out: how to go it, and what has to be seen of it."""

    go: Callable[[Scene], Awaitable[None]]
    outcome: str
    reason: str | None = None
    saved: bool = True
    error_type: str | None = None
    text: str = ""


async def _returns(scene: Scene) -> None:
    result = await scene.start()
    assert result.output == "one two three"


async def _cancelled_while(scene: Scene) -> None:
    task = await scene.start_and_reach()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError) as caught:
        await task
    assert caught.value.messages == scene.session.msgs
    assert caught.value.reason == "cancel"


async def _cancelled_mid_token(scene: Scene) -> None:
    scene.stage.hold_after = 2
    await _cancelled_while(scene)
    last = scene.session.msgs[-1]
    assert isinstance(last, ModelResponse)
    assert last.text == "one two "


async def _cancelled_silent(scene: Scene) -> None:
    scene.stage.silent = True
    await _cancelled_while(scene)


async def _cancelled_in_tool(scene: Scene) -> None:
    scene.stage.call_tool = scene.stage.hold_tool = True
    await _cancelled_while(scene)


async def _cancels_itself(scene: Scene) -> None:
    scene.stage.call_tool = scene.stage.cancel_in_tool = scene.stage.hold_tool = True
    with pytest.raises(agx.AgxCanceledError):
        await scene.start()


async def _task_cancelled(scene: Scene) -> None:
    scene.stage.hold_after = 1
    task = await scene.start_and_reach()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _task_cancelled_twice(scene: Scene) -> None:
    scene.stage.hold_after = 1
    scene.session.may_save = asyncio.Event()
    task = await scene.start_and_reach()
    task.cancel()
    await scene.session.saving.wait()
    task.cancel()
    scene.session.may_save.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _timeout_around(scene: Scene) -> None:
    scene.stage.hold_after = 1

    async def run_within(timeout: asyncio.Timeout) -> None:
        async with timeout:
            await agx.run(scene.session, scene.stage.agent(), "Hello", deps=ScopeDeps())

    timeout = asyncio.timeout(None)
    running = asyncio.create_task(run_within(timeout))
    await scene.stage.reached.wait()
    timeout.reschedule(asyncio.get_running_loop().time())
    with pytest.raises(TimeoutError):
        await running


async def _upstream_timeout(scene: Scene) -> None:
    scene.stage.hold_after = 1
    scene.kwargs["timeout"] = 0.8
    with pytest.raises(RunTimedOut):
        await scene.start()


async def _model_fails(scene: Scene) -> None:
    scene.stage.model_error = LookupError("no such model")
    with pytest.raises(LookupError):
        await scene.start()


async def _tool_fails(scene: Scene) -> None:
    scene.stage.call_tool = True
    scene.stage.tool_error = ArithmeticError("tool broke")
    with pytest.raises(ArithmeticError):
        await scene.start()


async def _validator_fails(scene: Scene) -> None:
    agent = scene.stage.agent(retries=0)

    @agent.output_validator
    async def refuse(output: str) -> str:
        raise ModelRetry("not good enough")

    with pytest.raises(UnexpectedModelBehavior):
        await agx.run(scene.session, agent, "Hello", deps=ScopeDeps())


async def _load_fails(scene: Scene) -> None:
    scene.session.load_error = OSError("disk on fire")
    with pytest.raises(OSError, match="disk on fire"):
        await scene.start()


async def _save_fails(scene: Scene) -> None:
    scene.session.save_error = OSError("disk full")
    with pytest.raises(agx.SessionSaveError) as caught:
        await scene.start()
    assert caught.value.result is not None
    assert caught.value.result.output == "one two three"
    assert isinstance(caught.value.messages[-1], ModelResponse)


async def _cancelled_while_loading(scene: Scene) -> None:
    scene.session.may_load = asyncio.Event()
    scene.stage.silent = True
    task = scene.start()
    await scene.session.loading.wait()
    assert await agx.cancel(1, 1, "s")
    (run,) = current_engine().runs
    assert isinstance(run, RunLifecycle)
    await wait_until(lambda: run.recorder.state.must_stop)
    scene.session.may_load.set()
    with pytest.raises(agx.AgxCanceledError):
        await task


async def _shut_down(scene: Scene) -> None:
    scene.stage.hold_after = 1
    task = await scene.start_and_reach()
    await agx.aclose(grace=0)
    with pytest.raises(agx.AgxCanceledError) as caught:
        await task
    assert caught.value.reason == "shutdown"


async def _shut_down_with_grace(scene: Scene) -> None:
    task = scene.start()
    await scene.session.loading.wait()
    await agx.aclose(grace=30)
    assert (await task).output == "one two three"


async def _lease_deleted(scene: Scene) -> None:
    scene.stage.hold_after = 1
    task = await scene.start_and_reach()
    assert await scene.redis.delete("agx:1:1:s:live") == 1
    with pytest.raises(agx.AgxCanceledError) as caught:
        await task
    assert caught.value.reason == "lease_deleted"


WAYS = {
    "returns": Way(_returns, "completed", text="one two three"),
    "cancelled mid-token": Way(_cancelled_mid_token, "cancelled", "cancel", text="one two "),
    "cancelled in a silent model": Way(_cancelled_silent, "cancelled", "cancel"),
    "cancelled in a tool": Way(_cancelled_in_tool, "cancelled", "cancel"),
    "cancels itself in a tool": Way(_cancels_itself, "cancelled", "cancel"),
    "task cancelled": Way(_task_cancelled, "cancelled", "task", text="one "),
    "task cancelled twice": Way(_task_cancelled_twice, "cancelled", "task", text="one "),
    "timeout around": Way(_timeout_around, "cancelled", "task", text="one "),
    "timeout of pydantic-ai": Way(
        _upstream_timeout, "failed", error_type="pydantic_ai.exceptions.RunTimedOut", text="one "
    ),
    "model fails": Way(_model_fails, "failed", error_type="LookupError", text="one "),
    "tool fails": Way(_tool_fails, "failed", error_type="ArithmeticError"),
    "validator fails": Way(
        _validator_fails,
        "failed",
        error_type="pydantic_ai.exceptions.UnexpectedModelBehavior",
        text="one two three",
    ),
    "load fails": Way(_load_fails, "failed", saved=False, error_type="OSError"),
    "save fails": Way(_save_fails, "failed", saved=False, error_type="OSError", text="one two three"),
    "cancelled while loading": Way(_cancelled_while_loading, "cancelled", "cancel"),
    "shut down": Way(_shut_down, "cancelled", "shutdown", text="one "),
    "shut down with grace": Way(_shut_down_with_grace, "completed", text="one two three"),
    "lease deleted": Way(_lease_deleted, "cancelled", "lease_deleted", text="one "),
}


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=0.9))
        yield client
        await agx.aclose()


@pytest.fixture(params=["sdk", "no sdk"])
def spans(request: pytest.FixtureRequest) -> Iterator[SpanLedger | None]:
    if request.param == "no sdk":
        yield None
        return
    with installed_sdk() as ledger:
        yield ledger


@pytest.mark.parametrize("name", WAYS)
async def test_run_ends_once(name: str, redis: Redis, spans: SpanLedger | None) -> None:
    way = WAYS[name]
    scene = Scene(redis)
    await way.go(scene)
    recorded = await read_recorded(redis)
    await _check_recorded(redis, recorded, way.outcome, way.reason, way.error_type)
    assert recorded.text == way.text
    assert scene.session.saves == (1 if way.saved else 0)
    _check_spans(spans, way.outcome, way.reason)


async def _check_recorded(
    redis: Redis, recorded: Recorded, outcome: str, reason: str | None, error_type: str | None
) -> None:
    types = [entry.type for entry in recorded.entries]
    assert types.count("begin") == types.count("end") == 1
    assert types[0] == "begin"
    assert types[-1] == "end"
    end = recorded.entries[-1].body
    assert (end["outcome"], end["reason"]) == (outcome, reason)
    assert [entry.body["seq"] for entry in recorded.entries] == list(range(len(types)))
    nodes = [body["event"] for body in recorded.bodies("event") if body["event"].startswith("llm-")]
    assert nodes == ["llm-begin", "llm-end"] * (len(nodes) // 2)

    errors = recorded.bodies("error")
    if outcome == "cancelled":
        assert [body["msg"] for body in errors] == ["canceled"]
    elif outcome == "failed":
        assert [body["error_type"] for body in errors] == [error_type]
    else:
        assert not errors

    recorded.one(facts.RunStarted)
    ended = recorded.one(facts.RunEnded)
    assert (ended.outcome, ended.reason, ended.error_type) == (outcome, reason, error_type)
    assert ended.end_ms == int(recorded.entries[-1].id.split("-")[0])
    assert len({fact.id for fact in recorded.facts}) == len(recorded.facts)
    calls = [fact for fact in recorded.of(facts.NodeEnded) if fact.model is not None]
    assert ended.model_calls == len(calls)
    assert ended.tool_calls == len(recorded.of(facts.ToolEnded))

    assert not await redis.exists("agx:1:1:s:live")
    assert not await redis.zcard("agx:1:1")
    assert [await redis.zcard(f"agx::leases:{n}") for n in range(8)] == [0] * 8
    assert 0 < await redis.ttl("agx:1:1:s") <= 300


def _check_spans(spans: SpanLedger | None, outcome: str, reason: str | None) -> None:
    if spans is None:
        return
    assert len(spans.ended) == len(spans.started)
    assert len({span.context.span_id for span in spans.ended if span.context}) == len(spans.ended)
    run = spans.one("agx.run")
    assert run.attributes is not None
    assert run.attributes["agx.run.outcome"] == outcome
    assert run.attributes.get("agx.run.reason") == reason
    assert run.status.is_unset == (outcome in ("completed", "cancelled"))
    assert run.status.description is None


# --- an agent that is driven from outside ---


async def _capability_run(scene: Scene, agent: Any) -> None:
    assert (await agent.run("Hello", deps=ScopeDeps())).output == "one two three"


async def _capability_run_stream(scene: Scene, agent: Any) -> None:
    async with agent.run_stream("Hello", deps=ScopeDeps()) as result:
        assert await result.get_output() == "one two three"


async def _capability_iter(scene: Scene, agent: Any) -> None:
    async with agent.iter("Hello", deps=ScopeDeps()) as run:
        async for _ in run:
            pass
    assert run.result.output == "one two three"


async def _capability_node_stream(scene: Scene, agent: Any) -> None:
    async with agent.iter("Hello", deps=ScopeDeps()) as run:
        async for node in run:
            if agent.is_model_request_node(node) or agent.is_call_tools_node(node):
                async with node.stream(run.ctx) as events:
                    async for _ in events:
                        pass


async def _capability_left_early(scene: Scene, agent: Any) -> None:
    async with agent.iter("Hello", deps=ScopeDeps()) as run:
        async for node in run:
            if agent.is_model_request_node(node):
                break


async def _capability_stream_left_early(scene: Scene, agent: Any) -> None:
    scene.stage.hold_after = 2
    async with agent.run_stream("Hello", deps=ScopeDeps()) as result:
        async for _ in result.stream_text(debounce_by=None):
            break


async def _capability_cancelled(scene: Scene, agent: Any) -> None:
    scene.stage.hold_after = 1
    task = asyncio.create_task(agent.run("Hello", deps=ScopeDeps()))
    await scene.stage.reached.wait()
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(RunCancelled):
        await task


async def _capability_cancels_itself(scene: Scene, agent: Any) -> None:
    scene.stage.call_tool = scene.stage.cancel_in_tool = scene.stage.hold_tool = True
    with pytest.raises(RunCancelled):
        await agent.run("Hello", deps=ScopeDeps())


async def _capability_task_cancelled(scene: Scene, agent: Any) -> None:
    scene.stage.hold_after = 1
    task = asyncio.create_task(agent.run("Hello", deps=ScopeDeps()))
    await scene.stage.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _capability_timeout(scene: Scene, agent: Any) -> None:
    scene.stage.hold_after = 1
    with pytest.raises(RunTimedOut):
        await agent.run("Hello", deps=ScopeDeps(), timeout=0.8)


async def _capability_model_fails(scene: Scene, agent: Any) -> None:
    scene.stage.model_error = LookupError("no such model")
    with pytest.raises(LookupError):
        await agent.run("Hello", deps=ScopeDeps())


async def _capability_tool_fails(scene: Scene, agent: Any) -> None:
    scene.stage.call_tool = True
    scene.stage.tool_error = ArithmeticError("tool broke")
    with pytest.raises(ArithmeticError):
        await agent.run("Hello", deps=ScopeDeps())


DRIVEN: dict[str, tuple[Callable[[Scene, Any], Awaitable[None]], str, str | None, str | None]] = {
    "run": (_capability_run, "completed", None, None),
    "run_stream": (_capability_run_stream, "completed", None, None),
    "iter": (_capability_iter, "completed", None, None),
    "node.stream": (_capability_node_stream, "completed", None, None),
    "iter left early": (_capability_left_early, "cancelled", "abandoned", None),
    "run_stream left early": (_capability_stream_left_early, "cancelled", "abandoned", None),
    "cancelled": (_capability_cancelled, "cancelled", "cancel", None),
    "cancels itself": (_capability_cancels_itself, "cancelled", "cancel", None),
    "task cancelled": (_capability_task_cancelled, "cancelled", "task", None),
    "timeout": (_capability_timeout, "failed", None, "pydantic_ai.exceptions.RunTimedOut"),
    "model fails": (_capability_model_fails, "failed", None, "LookupError"),
    "tool fails": (_capability_tool_fails, "failed", None, "ArithmeticError"),
}


@pytest.mark.parametrize("name", DRIVEN)
async def test_capability_ends_once(name: str, redis: Redis, spans: SpanLedger | None) -> None:
    go, outcome, reason, error_type = DRIVEN[name]
    scene = Scene(redis)
    await go(scene, scene.stage.agent(capabilities=[agx.AgxCapability()]))
    await _check_recorded(redis, await read_recorded(redis), outcome, reason, error_type)
    _check_spans(spans, outcome, reason)


async def test_capability_on_the_agent_does_not_double_a_run(redis: Redis, spans: SpanLedger | None) -> None:
    scene = Scene(redis, agent_kwargs={"capabilities": [agx.AgxCapability()]})
    await _returns(scene)
    recorded = await read_recorded(redis)
    await _check_recorded(redis, recorded, "completed", None, None)
    assert recorded.text == "one two three"
    _check_spans(spans, "completed", None)


async def test_same_deps_for_two_turns(redis: Redis) -> None:
    deps, session, stage = ScopeDeps(), FakeSession(), ScriptedAgent()
    agent = stage.agent()
    for turn in (1, 2):
        await agx.run(session, agent, "Hello", deps=deps)
        recorded = await read_recorded(redis)
        assert recorded.bodies("event")[0]["idx"] == 0
        assert len(recorded.bodies("begin")) == 1
        assert len(session.msgs) == 2 * turn
    first, second = recorded.of(facts.RunEnded)
    assert (first.outcome, second.outcome) == ("completed", "completed")
    assert recorded.bodies("begin")[0]["follows"] == f"00-{first.trace.trace_id}-{first.trace.span_id}-01"


async def test_sub_agent_in_a_tool_has_no_stream_of_its_own(redis: Redis, spans: SpanLedger | None) -> None:
    inner = ScriptedAgent(words=("in", "ner"), streams=False).agent(capabilities=[agx.AgxCapability()])
    agent = ScriptedAgent(call_tool=True, delegate=inner).agent()
    result = await agx.run(FakeSession(), agent, "Hello", deps=ScopeDeps())
    assert result.output == "one two three"
    recorded = await read_recorded(redis)
    assert len(recorded.bodies("begin")) == 1
    assert recorded.text == "one two three"
    runs = {fact.run_id: fact for fact in recorded.of(facts.RunEnded)}
    assert len(runs) == 2
    sub = next(fact for fact in runs.values() if fact.parent_run_id is not None)
    assert sub.parent_run_id in runs
    assert sub.stream is None
    (tool,) = recorded.of(facts.ToolEnded)
    if spans is None:
        assert sub.trace.parent_span_id == tool.trace.span_id
    assert sub.trace.trace_id == tool.trace.trace_id
    assert len([fact for fact in recorded.of(facts.NodeEnded) if fact.model]) == 3


def test_two_loops_in_two_threads(redis_url: str) -> None:
    agx.configure(agx.Config(redis=Redis.from_url(redis_url)))
    outputs: list[str] = []

    async def one(session: str) -> None:
        deps = ScopeDeps(session_id=session)
        result = await agx.run(FakeSession(), ScriptedAgent().agent(), "Hello", deps=deps)
        outputs.append(result.output)

    threads = [threading.Thread(target=asyncio.run, args=(one(f"s{n}"),)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == ["one two three"] * 2
    # A third loop, after both are gone.
    asyncio.run(one("s0"))
    assert len(outputs) == 3


async def test_busy_session_is_refused(redis: Redis) -> None:
    stage = ScriptedAgent(hold_after=1)
    running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hello", deps=ScopeDeps()))
    await stage.reached.wait()
    with pytest.raises(agx.SessionBusyError):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hello", deps=ScopeDeps())
    assert await agx.cancel(1, 1, "s")
    with pytest.raises(agx.AgxCanceledError):
        await running
    assert not await agx.cancel(1, 1, "s")


@pytest.mark.parametrize(("words", "tokens"), [(("x" * 40, "more"), 10), (("ab", "c" * 9, "more"), 3)])
async def test_a_cut_answer_without_usage_is_estimated(redis: Redis, words: tuple[str, ...], tokens: int) -> None:
    # The scripted model knows its usage; a provider that sends it last does not, when it is cut off.
    stage = ScriptedAgent(words=words, hold_after=len(words) - 1)
    agent = stage.agent()
    running = asyncio.create_task(agx.run(FakeSession(), agent, "Hello", deps=ScopeDeps()))
    await stage.reached.wait()
    with patch("pydantic_ai.usage.RequestUsage.has_values", return_value=False):
        assert await agx.cancel(1, 1, "s")
        with pytest.raises(agx.AgxCanceledError):
            await running
    recorded = await read_recorded(redis)
    (call,) = [fact.model for fact in recorded.of(facts.NodeEnded) if fact.model is not None]
    assert (call.usage.source, call.usage.output) == ("estimated", tokens)
