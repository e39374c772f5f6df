"""Spans per node, told once: with an SDK in the process, without one, and under somebody else's span."""

from __future__ import annotations

from collections.abc import Iterator

import logfire
import pytest
from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry import trace as otel
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from pydantic_ai.capabilities import Instrumentation
from pydantic_ai.models.instrumented import InstrumentationSettings
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.recorded import read_recorded
from support.sdk import SpanLedger, installed_sdk

import agx
from agx.facts import schema as facts

SECRET = "xyzzy-secret"


@pytest.fixture
def spans() -> Iterator[SpanLedger]:
    with installed_sdk() as ledger:
        yield ledger


async def _run(stage: ScriptedAgent, **kwargs: object) -> None:
    await agx.run(FakeSession(), stage.agent(**kwargs), f"Hello {SECRET}", deps=ScopeDeps())


def _tree(spans: SpanLedger) -> list[tuple[str, str | None]]:
    return sorted((span.name, spans.parent_name(span)) for span in spans.ended)


TREE = [
    ("agx.node call_tools", "invoke_agent staged"),
    ("agx.node call_tools", "invoke_agent staged"),
    ("agx.node model_request", "invoke_agent staged"),
    ("agx.node model_request", "invoke_agent staged"),
    ("agx.node user_prompt", "invoke_agent staged"),
    ("agx.run staged", None),
    ("chat function::_stream", "agx.node model_request"),
    ("chat function::_stream", "agx.node model_request"),
    ("execute_tool work", "agx.node call_tools"),
    ("invoke_agent staged", "agx.run staged"),
]


async def test_with_an_sdk_upstream_nests_inside(configured: Redis, spans: SpanLedger) -> None:
    await _run(ScriptedAgent(call_tool=True))
    assert _tree(spans) == TREE
    recorded = await read_recorded(configured)
    run = spans.one("agx.run")
    assert run.context is not None
    for fact in recorded.facts:
        assert isinstance(fact, facts.RunFact)
        assert fact.trace.sdk
        assert fact.trace.sampled
        assert fact.trace.trace_id == f"{run.context.trace_id:032x}"
    assert recorded.one(facts.RunEnded).trace.span_id == f"{run.context.span_id:016x}"
    assert recorded.bodies("begin")[0]["traceparent"] == f"00-{run.context.trace_id:032x}-{run.context.span_id:016x}-01"


async def test_tokens_are_on_upstreams_spans_once(configured: Redis, spans: SpanLedger) -> None:
    await _run(ScriptedAgent(call_tool=True))
    counted = sum(
        int(span.attributes["gen_ai.usage.output_tokens"])  # type: ignore[arg-type] # an attribute's union of types
        for span in spans.named("chat")
        if span.attributes
    )
    recorded = await read_recorded(configured)
    assert counted == sum(fact.model.usage.output for fact in recorded.of(facts.NodeEnded) if fact.model)
    assert not any("gen_ai.usage" in key for span in spans.named("agx.") for key in span.attributes or {})


async def test_no_content_leaves_by_default(configured: Redis, spans: SpanLedger) -> None:
    stage = ScriptedAgent(call_tool=True, words=(SECRET,), tool_error=ArithmeticError(SECRET))
    with pytest.raises(ArithmeticError):
        await _run(stage)
    await _run(ScriptedAgent(words=(SECRET, SECRET)))
    for span in spans.ended:
        assert SECRET not in span.to_json()
    for fact in (await read_recorded(configured)).facts:
        assert SECRET not in facts.encode(fact).decode()


async def test_content_capture_by_the_standard_variable(
    configured: Redis, spans: SpanLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_ONLY")
    await _run(ScriptedAgent(words=(SECRET, SECRET)))
    assert any(SECRET in span.to_json() for span in spans.named("chat"))
    with pytest.raises(LookupError):
        await _run(ScriptedAgent(model_error=LookupError(SECRET)))
    recorded = await read_recorded(configured)
    assert [fact.error_message for fact in recorded.of(facts.RunEnded)] == [None, SECRET]


async def test_a_users_own_instrumentation_is_left_as_it_is(configured: Redis, spans: SpanLedger) -> None:
    own = Instrumentation(InstrumentationSettings(include_content=True))
    await _run(ScriptedAgent(call_tool=True), capabilities=[own])
    assert _tree(spans) == TREE
    assert any(SECRET in span.to_json() for span in spans.named("chat"))


async def test_under_the_services_own_span(configured: Redis, spans: SpanLedger) -> None:
    with otel.get_tracer("service").start_as_current_span("POST /chat"):
        await _run(ScriptedAgent())
    assert spans.parent_name(spans.one("agx.run")) == "POST /chat"
    assert otel_context.get_current() == {}


async def test_an_unsampled_run_has_facts_that_say_so(configured: Redis) -> None:
    with installed_sdk(ALWAYS_OFF) as spans:
        await _run(ScriptedAgent())
    assert not spans.started
    for fact in (await read_recorded(configured)).of(facts.RunEnded):
        assert fact.trace.sdk
        assert not fact.trace.sampled


async def test_logfire_is_recognised(configured: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = SpanLedger()
    monkeypatch.setattr(otel, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(otel._TRACER_PROVIDER_SET_ONCE, "_done", False)
    logfire.configure(
        send_to_logfire=False, console=False, additional_span_processors=[ledger], inspect_arguments=False
    )
    await _run(ScriptedAgent(call_tool=True))
    ended = [span for span in ledger.ended if (span.attributes or {}).get("logfire.span_type") != "pending_span"]
    assert sorted(span.name.split(" ")[0] for span in ended) == sorted(name.split(" ")[0] for name, _ in TREE)
    assert all(fact.trace.sdk for fact in (await read_recorded(configured)).of(facts.RunEnded))
    logfire.shutdown()


async def test_without_an_sdk_tools_send_our_traceparent(configured: Redis) -> None:
    sent: dict[str, str] = {}
    agent = ScriptedAgent(call_tool=True, on_tool=lambda: propagate.inject(sent)).agent()
    await agx.run(FakeSession(), agent, "Hello", deps=ScopeDeps())
    recorded = await read_recorded(configured)
    ended, tool = recorded.one(facts.RunEnded), recorded.one(facts.ToolEnded)
    assert sent["traceparent"] == f"00-{ended.trace.trace_id}-{tool.trace.span_id}-01"
    assert not ended.trace.sdk
    assert ended.trace.parent_span_id is None
    assert ended.trace.span_id == facts.span_id(ended.run_id, "run")
    model_nodes = [fact for fact in recorded.of(facts.NodeEnded) if fact.model]
    for fact in (*model_nodes, tool):
        assert fact.trace.parent_span_id == ended.trace.span_id
    assert len({fact.trace.span_id for fact in (*model_nodes, tool, ended)}) == 4
    assert otel_context.get_current() == {}


@pytest.mark.parametrize("sampled", [True, False])
async def test_without_an_sdk_a_remote_parent_is_followed(configured: Redis, sampled: bool) -> None:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    remote = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=flags))
    token = otel_context.attach(otel.set_span_in_context(remote))
    await _run(ScriptedAgent())
    otel_context.detach(token)
    ended = (await read_recorded(configured)).one(facts.RunEnded)
    assert not ended.trace.sdk
    assert ended.trace.sampled == sampled
    assert (ended.trace.trace_id, ended.trace.parent_span_id) == (f"{0xABC:032x}", f"{0xDEF:016x}")


async def test_trace_ratio_samples_at_the_root(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, trace_ratio=0.0))
        await _run(ScriptedAgent())
        assert not (await read_recorded(client)).one(facts.RunEnded).trace.sampled
        await agx.aclose()


async def test_a_run_caused_by_another_traces_message_has_a_link_to_it(configured: Redis, spans: SpanLedger) -> None:
    cause = f"00-{0xABC:032x}-{0xDEF:016x}-01"
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hello", deps=ScopeDeps(follows=cause))
    run = spans.one("agx.run")
    assert run.parent is None
    assert [(link.context.trace_id, link.context.span_id) for link in run.links] == [(0xABC, 0xDEF)]
    recorded = await read_recorded(configured)
    assert recorded.bodies("begin")[0]["follows"] == cause
    assert recorded.one(facts.RunEnded).follows == cause
    agent = ScriptedAgent().agent(capabilities=[agx.AgxCapability()])
    await agent.run("Hello", deps=ScopeDeps(session_id="t", follows=cause))
    assert (await read_recorded(configured, "agx:1:1:t")).bodies("begin")[0]["follows"] == cause
