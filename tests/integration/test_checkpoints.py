"""A run is killed at each of its points, and goes on from its checkpoints: it ends as an undisturbed one does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import (
    Agent,
    DeferredToolRequests,
    DeferredToolResults,
    ModelRetry,
    NativeOutput,
    RunContext,
    ToolDenied,
    ToolReturn,
)
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.exceptions import ToolFailed
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.usage import RunUsage, UsageLimits
from redis.asyncio import Redis
from support.agents import ScopeDeps
from support.killed_runs import Ended, KilledError, Ledger, Points, Scenario, Stream, attempt

import agx

Step = str | Sequence[tuple[str, str]]  # a text, or calls of tools: name and arguments
RETRY = {"on_resume": "retry"}


class Weather(BaseModel):
    """An output."""

    city: str
    degrees: int


def count_steps(messages: list[ModelMessage]) -> int:
    """Return how many responses the run has: those behind the conversation's last prompt from outside."""
    return sum(isinstance(message, ModelResponse) and message.model_name != "earlier" for message in messages)


def script(ledger: Ledger, *steps: Step, step_of: Callable[[list[ModelMessage]], int] = count_steps) -> FunctionModel:
    """Return a model that answers with one step after another; the ids of its calls are `{step}-{place}`."""

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        number = step_of(messages)
        ledger.add(f"model {number}")
        step = steps[number]
        if isinstance(step, str):
            for word in step.split(" "):
                yield word + " "
            return
        for place, (name, args) in enumerate(step):
            yield {place: DeltaToolCall(name, args, tool_call_id=f"{number}-{place}")}
        ledger.points.reach(f"end of model {number}")

    return FunctionModel(stream_function=answer, model_name="scripted")


def make_agent(ledger: Ledger, model: FunctionModel, **settings: Any) -> Agent[ScopeDeps, Any]:
    """Return an agent with tools of every kind; all of them may be run again."""
    settings.setdefault("instructions", "Be good.")
    agent: Agent[ScopeDeps, Any] = Agent(model, name="killed", deps_type=ScopeDeps, retries=3, **settings)

    @agent.tool(metadata=RETRY)
    async def plain(ctx: RunContext[ScopeDeps], x: int) -> dict[str, int]:
        ledger.add(f"tool {ctx.tool_call_id}")
        return {"x": x}

    @agent.tool(metadata=RETRY)
    async def rich(ctx: RunContext[ScopeDeps], x: int) -> ToolReturn:
        ledger.add(f"tool {ctx.tool_call_id}")
        return ToolReturn(return_value=[x], content=["see", "this"], metadata={"m": x})

    @agent.tool(metadata=RETRY, sequential=True)
    async def alone(ctx: RunContext[ScopeDeps], x: int) -> int:
        ledger.add(f"tool {ctx.tool_call_id}")
        return x

    @agent.tool(metadata=RETRY)
    async def failing(ctx: RunContext[ScopeDeps], x: int) -> str:
        ledger.add(f"tool {ctx.tool_call_id}")
        raise ToolFailed("no such order")

    @agent.tool(metadata=RETRY)
    async def picky(ctx: RunContext[ScopeDeps], x: int) -> str:
        ledger.add(f"tool {ctx.tool_call_id}")
        if x < 2:
            raise ModelRetry("larger")
        return "large enough"

    @agent.tool(metadata=RETRY)
    async def noting(ctx: RunContext[ScopeDeps], x: int) -> int:
        ledger.add(f"tool {ctx.tool_call_id}")
        ctx.enqueue(f"note {x}")
        return x

    @agent.tool(metadata=RETRY)
    async def reminding(ctx: RunContext[ScopeDeps], x: int) -> int:
        ledger.add(f"tool {ctx.tool_call_id}")
        ctx.enqueue(f"remind {x}", priority="when_idle")
        return x

    @agent.tool(metadata=RETRY)
    async def asking(ctx: RunContext[ScopeDeps], x: int) -> str:
        ledger.add(f"tool {ctx.tool_call_id}")

        def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            ledger.add(f"sub {x}")
            return ModelResponse(parts=[TextPart(f"sub {x}")])

        inner = Agent(FunctionModel(answer), name="sub", capabilities=[agx.AgxCapability()])
        return str((await inner.run(f"ask {x}", usage=ctx.usage)).output)

    @agent.tool(metadata=RETRY, requires_approval=True)
    async def risky(ctx: RunContext[ScopeDeps], x: int) -> int:
        ledger.add(f"tool {ctx.tool_call_id}")
        return x

    return agent


def scripted(*steps: Step, **settings: Any) -> Callable[[Ledger], Agent[ScopeDeps, Any]]:
    return lambda ledger: make_agent(ledger, script(ledger, *steps), **settings)


def _make_validated(ledger: Ledger) -> Agent[ScopeDeps, Any]:
    steps = ([("final_result", '{"city":"Oslo","degrees":-99}')], [("final_result", '{"city":"Oslo","degrees":3}')])
    return _with_validator(make_agent(ledger, script(ledger, [("plain", '{"x":1}')], *steps), output_type=Weather))


def _make_native(ledger: Ledger) -> Agent[ScopeDeps, Any]:
    model = script(ledger, [("plain", '{"x":1}')], '{"city":"Oslo","degrees":-99}', '{"city":"Oslo","degrees":3}')
    model.profile = {**model.profile, "supports_json_schema_output": True}  # type: ignore[misc,assignment,attr-defined]
    return _with_validator(make_agent(ledger, model, output_type=NativeOutput(Weather)))


def _with_validator(agent: Agent[ScopeDeps, Any]) -> Agent[ScopeDeps, Any]:
    @agent.output_validator
    def check(ctx: RunContext[ScopeDeps], output: Weather) -> Weather:
        if output.degrees < -90:
            raise ModelRetry(f"too cold, retry {ctx.retry}")
        return output.model_copy(update={"city": f"{output.city} {ctx.retry}"})

    return agent


def _make_forgetful(ledger: Ledger) -> Agent[ScopeDeps, Any]:
    """Return an agent that sends only the last two messages; its model takes the step from the last tool call."""

    def step_of(messages: list[ModelMessage]) -> int:
        calls = [part for m in messages for part in m.parts if isinstance(part, ToolCallPart)]
        return int(calls[-1].tool_call_id.partition("-")[0]) + 1 if calls else 0

    steps: list[Step] = [[("plain", '{"x":1}'), ("rich", '{"x":2}')], [("plain", '{"x":3}')], "the end"]
    model = script(ledger, *steps, step_of=step_of)
    return make_agent(ledger, model, capabilities=[ProcessHistory(lambda messages: messages[-2:])])


EARLIER = (
    ModelRequest(parts=[UserPromptPart("before")]),
    ModelResponse(parts=[TextPart("then")], model_name="earlier"),
    ModelRequest(parts=[UserPromptPart("again")]),
    ModelResponse(parts=[TextPart("well")], model_name="earlier"),
)
DEFERRED = (
    ModelRequest(parts=[UserPromptPart("pay")]),
    ModelResponse(
        parts=[
            ToolCallPart("risky", {"x": 1}, "p1"),
            ToolCallPart("risky", {"x": 2}, "p2"),
            ToolCallPart("risky", {"x": 3}, "p3"),
        ],
        model_name="earlier",
    ),
)


def _approve() -> dict[str, Any]:
    return {"deferred_tool_results": DeferredToolResults(approvals={"p1": True, "p2": ToolDenied("no"), "p3": True})}


ALL_KINDS: list[tuple[str, str]] = [(name, '{"x":1}') for name in ("plain", "rich", "alone", "failing", "picky")]
SCENARIOS = {
    "text": Scenario(scripted("one two three")),
    "no instructions": Scenario(scripted([("plain", '{"x":1}')], "done now", instructions=None)),
    "a prompt of parts": Scenario(scripted([("plain", '{"x":1}')], "done now"), prompt=["look", "here"]),
    "tools of all kinds": Scenario(scripted(ALL_KINDS, [("picky", '{"x":2}')], "fin al")),
    "bad arguments and unknown tools": Scenario(
        scripted([("plain", '{"x":"a"}'), ("nothing", "{}"), ("rich", '{"x":1}')], [("plain", '{"x":2}')], "end")
    ),
    "a conversation of several turns": Scenario(scripted([("plain", '{"x":1}')], "end"), stored=EARLIER),
    "message_history": Scenario(
        scripted([("plain", '{"x":1}')], "end"), make_kwargs=lambda: {"message_history": list(EARLIER)}
    ),
    "no prompt": Scenario(scripted([("plain", '{"x":1}')], "end"), prompt=None, stored=EARLIER[:3]),
    "tool output": Scenario(
        scripted([("plain", '{"x":1}')], [("final_result", '{"city":"Oslo","degrees":3}')], output_type=Weather)
    ),
    "output retry": Scenario(_make_validated),
    "native output": Scenario(_make_native),
    "enqueued": Scenario(scripted([("noting", '{"x":1}'), ("plain", '{"x":2}'), ("noting", '{"x":3}')], "end")),
    "enqueued for the end": Scenario(
        scripted([("reminding", '{"x":1}'), ("noting", '{"x":2}')], [("plain", '{"x":3}')], "end", "end again")
    ),
    "history processor": Scenario(_make_forgetful),
    "sub-agent": Scenario(scripted([("asking", '{"x":1}'), ("plain", '{"x":2}')], "end")),
    "approvals": Scenario(scripted("paid now"), prompt=None, stored=DEFERRED, make_kwargs=_approve),
    "ends in a request for approval": Scenario(
        scripted([("risky", '{"x":1}'), ("plain", '{"x":2}')], output_type=[str, DeferredToolRequests])
    ),
}


@pytest.mark.parametrize("eager", [True, False], ids=["stored at once", "stored at waits"])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_that_was_killed_at_any_point_ends_as_if_it_was_not(
    configured: Redis, name: str, eager: bool
) -> None:
    scenario = SCENARIOS[name]
    undisturbed = Ledger()
    expected = await attempt(scenario, undisturbed, Stream(eager), first=True)
    problems: list[str] = []
    for point, where in enumerate(undisturbed.points.names):
        if not eager and where != "before a wait":
            continue  # elsewhere the same entries are stored as with `eager`, or fewer
        ledger, stream = Ledger(Points(kill_at=point)), Stream(eager)
        with pytest.raises(KilledError):
            await attempt(scenario, ledger, stream, first=True)
        left = _left(undisturbed.calls, stream)
        made = len(ledger.calls)
        ledger.points = Points()
        try:
            ended = await attempt(scenario, ledger, stream, first=False)
        except Exception as error:
            problems.append(f"{where} ({point}): {error!r}")
            continue
        problems += [
            f"{where} ({point}): {what}"
            for what in _differences(expected, ended, len(ledger.calls) - len(undisturbed.calls))
        ]
        if sorted(call for call in ledger.calls[made:] if not call.startswith("sub")) != sorted(left):
            problems.append(f"{where} ({point}): made again {ledger.calls[made:]}, expected {left}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_that_is_killed_after_each_checkpoint_ends_as_if_it_was_not(configured: Redis, name: str) -> None:
    scenario = SCENARIOS[name]
    undisturbed, ledger = Ledger(), Ledger()
    expected = await attempt(scenario, undisturbed, Stream(eager=True), first=True)
    stream, attempts = Stream(eager=True), 0
    while True:
        # The first checkpoint of an attempt may only send a request again.
        ledger.points = Points(kill_after_checkpoints=len(stream.checkpoints) + 2)
        try:
            ended = await attempt(scenario, ledger, stream, first=attempts == 0)
        except KilledError:
            attempts += 1
            assert attempts < 50
            continue
        break
    assert attempts
    assert not _differences(expected, ended, len(ledger.calls) - len(undisturbed.calls))


async def test_a_caller_s_usage_has_the_totals_of_all_attempts(configured: Redis) -> None:
    """Its `usage=` counts from where the caller had it, also if the run was killed before it recorded any."""

    async def end(kill_at: int | None) -> RunUsage:
        given = RunUsage()
        scenario = Scenario(
            scripted([("plain", '{"x":1}')], "end"),
            make_kwargs=lambda: {"usage": given, "usage_limits": UsageLimits(request_limit=12)},
        )
        ledger, stream = Ledger(Points(kill_at=kill_at)), Stream(eager=True)
        first = kill_at is None
        if not first:
            given = RunUsage(requests=10, input_tokens=1_000)
            with pytest.raises(KilledError):
                await attempt(scenario, ledger, stream, first=True)
            ledger.points = Points()
        given = RunUsage(requests=10, input_tokens=1_000)
        ended = await attempt(scenario, ledger, stream, first=first)
        assert ended.usage is given
        return given

    undisturbed = Ledger()
    await attempt(Scenario(scripted([("plain", '{"x":1}')], "end")), undisturbed, Stream(eager=True), first=True)
    expected = await end(None)
    assert (expected.requests, expected.tool_calls) == (12, 1)
    points = [0, undisturbed.points.names.index("after part_start 0-0"), len(undisturbed.points.names) - 1]
    for point in points:
        assert await end(point) == expected, undisturbed.points.names[point]


async def test_the_prompt_is_stored_by_the_first_attempt_that_gets_so_far(configured: Redis) -> None:
    stream = Stream(eager=True)
    await attempt(SCENARIOS["text"], Ledger(), stream, first=False)
    (prompt,) = ModelMessagesTypeAdapter.validate_json(stream.stored_prompt or b"[]")
    assert [part.content for part in prompt.parts if isinstance(part, UserPromptPart)] == ["hello"]


@pytest.mark.parametrize("point", ["in tool p1", "before part_start p1", "after part_start p1"])
async def test_an_approved_call_is_not_made_again(configured: Redis, point: str) -> None:
    """A turn that goes on with an approval has no message of its own yet: the stored conversation has the call."""

    def make(ledger: Ledger) -> Agent[ScopeDeps, Any]:
        agent = make_agent(ledger, script(ledger, "paid"))

        @agent.tool(requires_approval=True)
        async def once(ctx: RunContext[ScopeDeps], x: int) -> int:
            ledger.add(f"tool {ctx.tool_call_id}")
            return x

        return agent

    stored = (DEFERRED[0], ModelResponse(parts=[ToolCallPart("once", {"x": 1}, "p1")], model_name="earlier"))
    kwargs = {"deferred_tool_results": DeferredToolResults(approvals={"p1": True})}
    scenario = Scenario(make, prompt=None, stored=stored, make_kwargs=lambda: dict(kwargs))
    names = Ledger()
    await attempt(scenario, names, Stream(eager=True), first=True)
    ledger, stream = Ledger(Points(kill_at=names.points.names.index(point))), Stream(eager=True)
    with pytest.raises(KilledError):
        await attempt(scenario, ledger, stream, first=True)
    ledger.points = Points()
    ended = await attempt(scenario, ledger, stream, first=False)
    assert ledger.calls.count("tool p1") == 1
    parts = [part for message in ended.messages for part in message["parts"]]
    (returned,) = [part for part in parts if part["part_kind"] == "tool-return"]
    assert returned["outcome"] == ("success" if point.startswith("after") else "failed")


def _left(calls: Sequence[str], stream: Stream) -> list[str]:
    """Return the calls of an undisturbed run that the stream has no result of."""
    models = [call for call in calls if call.startswith("model")]
    tools = [call for call in calls if call.startswith("tool")]
    done = {f"tool {call_id}" for call_id in stream.returned}
    return [*models[stream.responses :], *(call for call in tools if call not in done)]


def _differences(expected: Ended, ended: Ended, again: int) -> list[str]:
    found = [
        f"expected {wanted}\n    got {got}"
        for wanted, got in zip(expected.messages, ended.messages, strict=False)
        if wanted != got
    ]
    if len(expected.messages) != len(ended.messages):
        found.append(f"{len(ended.messages)} messages instead of {len(expected.messages)}")
    if expected.output != ended.output:
        found.append(f"output {ended.output!r} instead of {expected.output!r}")
    # A call that is made again may count again: it was paid for again.
    more = ended.usage.requests - expected.usage.requests, ended.usage.tool_calls - expected.usage.tool_calls
    if not all(0 <= count <= again for count in more) or ended.usage.input_tokens < expected.usage.input_tokens:
        found.append(f"usage {ended.usage} instead of {expected.usage}")
    return found
