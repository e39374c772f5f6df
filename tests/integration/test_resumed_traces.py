"""A run that is resumed is one trace: its attempts are linked, each span exists once, and no parent is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps
from support.run_facts import FactsOfRun
from support.sdk import installed_sdk
from support.waiting import wait_until

import agx
from agx.facts.schema import RunEnded, RunResumed, RunStarted
from agx_sidecar.traces.spans import spans_of


async def _answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
    if any(isinstance(message, ModelResponse) for message in messages):
        yield "done"
    else:
        yield {0: DeltaToolCall("work", "{}", tool_call_id="c")}


async def _run_in_two_workers(client: Redis) -> FactsOfRun:
    """Run a job whose first worker hands it over behind its tool call."""
    working, handing_over = asyncio.Event(), asyncio.Event()
    agent = Agent(FunctionModel(stream_function=_answer), name="support", deps_type=ScopeDeps)

    @agent.tool_plain
    async def work() -> str:
        working.set()
        await handing_over.wait()
        return "ok"

    async def recipe(job: agx.Job) -> agx.Call:
        return agx.Call(
            FakeSession(), agent, ScopeDeps(scope=job.scope_id, user_id=job.user_id, session_id=job.session_id)
        )

    first, second = agx.Worker({"support": recipe}), agx.Worker({"support": recipe})
    running = asyncio.create_task(first.run())
    run_id = await agx.submit("1", "1", "s", agent="support", prompt="Hello")
    await working.wait()
    first.stop()
    await wait_until(lambda: all(run.handing_over for run in first._runs.values()))
    handing_over.set()
    await running
    running = asyncio.create_task(second.run())
    async for event in agx.listen("1", "1", "s", serialize=False, wait=30):
        last = event
    assert last["body"]["outcome"] == "completed"
    run = await FactsOfRun.read(client, run_id)
    second.stop()
    await running
    return run


async def test_without_an_sdk_all_attempts_are_steps_of_one_span(configured: Redis) -> None:
    run = await _run_in_two_workers(configured)
    run.check(attempts=2)
    (resumed,), (ended,) = run.of(RunResumed), run.of(RunEnded)
    assert resumed.before is None
    assert {fact.trace.parent_span_id for fact in run.requests} == {ended.trace.span_id}


async def test_with_an_sdk_each_attempt_has_a_span_in_one_trace(configured: Redis) -> None:
    with installed_sdk() as spans:
        run = await _run_in_two_workers(configured)
        (started,), (resumed,), (ended,) = run.of(RunStarted), run.of(RunResumed), run.of(RunEnded)
        second = spans.one("agx.run")  # nobody ends the first one's
        assert second.parent is not None
        assert f"{second.parent.span_id:016x}" == started.trace.span_id
        assert [f"{link.context.span_id:016x}" for link in second.links] == [started.trace.span_id]
        assert resumed.before is not None
        assert resumed.before.span_id == started.trace.span_id
        exported = [*spans.ended, *(span for fact in run.facts for span in spans_of(fact))]
    contexts = [span.context for span in exported if span.context is not None]
    ids = {context.span_id for context in contexts}
    assert len(ids) == len(exported)
    assert {context.trace_id for context in contexts} == {int(started.trace.trace_id, 16)}
    assert int(started.trace.span_id, 16) in ids
    assert ended.start_ns <= min(fact.start_ns for fact in run.requests)
