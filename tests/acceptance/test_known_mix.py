"""A known mix of 24 runs, a real sidecar, a real collector: exactly those counters, whole traces, and no content."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.otlp import OtlpReceiver, ReceivedSpan
from support.recorded import Recorded, read_recorded
from support.replica import Replica, Scrape
from support.waiting import wait_until

import agx
from agx.facts import schema as facts

SECRET = "xyzzy-prompt"
LEASE = 0.9  # seconds


def _stages() -> list[tuple[str, ScriptedAgent]]:
    """The mix: what each run does, and how it has to end."""
    inner = ScriptedAgent(words=(SECRET,), streams=False).agent(capabilities=[agx.AgxCapability()])
    return [
        *(("completed", ScriptedAgent(words=(SECRET, " said"))) for _ in range(8)),
        *(("completed", ScriptedAgent(call_tool=True)) for _ in range(4)),
        *(("cancelled", ScriptedAgent(hold_after=1)) for _ in range(4)),
        *(("cancelled", ScriptedAgent(call_tool=True, hold_tool=True)) for _ in range(2)),
        *(("failed", ScriptedAgent(model_error=LookupError(SECRET))) for _ in range(3)),
        *(("failed", ScriptedAgent(call_tool=True, tool_error=ArithmeticError(SECRET))) for _ in range(2)),
        ("completed", ScriptedAgent(call_tool=True, delegate=inner)),
    ]


async def _play(n: int, outcome: str, stage: ScriptedAgent) -> tuple[str, str]:
    """Run one of the mix; returns its scope and how it ended for the caller."""
    scope, session = f"scope-{n % 3}", f"s{n}"
    deps = ScopeDeps(scope=scope, session_id=session)
    running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), f"Tell {SECRET}", deps=deps))
    if outcome == "cancelled":
        await stage.reached.wait()
        assert await agx.cancel(scope, 1, session)
    try:
        await running
    except agx.AgxCanceledError:
        return scope, "cancelled"
    except (LookupError, ArithmeticError):
        return scope, "failed"
    return scope, "completed"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client, lease_ttl=LEASE, service_name="mixed", service_version="9"))
        yield client
        await agx.aclose()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_known_mix(protocol: str, redis: Redis, redis_url: str, otlp: OtlpReceiver, tmp_path: Path) -> None:
    endpoint = otlp.endpoint_grpc if protocol == "grpc" else otlp.endpoint_http
    sidecar = Replica(
        tmp_path / "sidecar",
        redis_url,
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_INSECURE="true",
    )
    try:
        mix = _stages()
        assert len(mix) == 24
        ended = Counter(await asyncio.gather(*(_play(n, outcome, stage) for n, (outcome, stage) in enumerate(mix))))
        await wait_until(lambda: sidecar.scrape().total("agx_runs_total") == 25)  # 24 and a sub-agent
        scrape = sidecar.scrape()
        recorded = await read_recorded(redis)
        _check_counters(scrape, ended, recorded)
        spans = await wait_until(lambda: _all_spans(otlp, recorded))
        _check_traces(spans, recorded)
        told_everywhere = [sidecar.scrape().text, *map(repr, spans), *map(repr, recorded.facts)]
        sidecar.end()
        for text in (*told_everywhere, sidecar.log):
            assert SECRET not in text
    finally:
        if sidecar.alive:
            sidecar.end()


def _check_counters(scrape: Scrape, ended: Counter[tuple[str, str]], recorded: Recorded) -> None:
    for (scope, outcome), count in ended.items():
        sub_agent = 1 if (scope, outcome) == ("scope-2", "completed") else 0
        assert scrape.total("agx_runs_total", scope=scope, outcome=outcome) == count + sub_agent
    assert Counter(outcome for _, outcome in ended.elements()) == {"completed": 13, "cancelled": 6, "failed": 5}
    assert scrape.total("agx_runs_started_total") == 25
    assert scrape.total("agx_run_duration_seconds_count") == 25
    assert scrape.total("agx_cancellations_total", reason="cancel", stage="model_request") == 4
    assert scrape.total("agx_cancellations_total", reason="cancel", stage="call_tools") == 2
    assert scrape.total("agx_cancel_latency_seconds_count") == 6
    assert scrape.total("agx_run_errors_total", error_type="LookupError") == 3
    assert scrape.total("agx_run_errors_total", error_type="ArithmeticError") == 2
    assert scrape.total("agx_tool_calls_total", outcome="ok") == 5
    assert scrape.total("agx_tool_calls_total", outcome="cancelled") == 2
    assert scrape.total("agx_tool_calls_total", outcome="error") == 2
    # Of 24 runs, 9 ask the model for a tool first, and 5 of those come back to it; one has a sub-agent.
    requests = 24 + 5 + 1
    assert scrape.total("gen_ai_client_operation_duration_seconds_count") == requests
    assert scrape.total("agx_usage_total") == requests
    calls = [fact.model for fact in recorded.of(facts.NodeEnded) if fact.model is not None]
    assert scrape.total("agx_tokens_total", type="output") == sum(call.usage.output for call in calls) > 0
    assert scrape.total("agx_tokens_total", type="input") == sum(call.usage.input for call in calls) > 0
    assert scrape.total("agx_facts_malformed_total") == 0


def _all_spans(otlp: OtlpReceiver, recorded: Recorded) -> list[ReceivedSpan] | None:
    # A run and its stream, each model request, each tool; the sub-agent has no stream.
    requests = [fact for fact in recorded.of(facts.NodeEnded) if fact.model is not None]
    expected = 25 + 24 + len(requests) + len(recorded.of(facts.ToolEnded))
    spans = otlp.spans
    assert len(spans) <= expected
    return spans if len(spans) == expected else None


def _check_traces(spans: list[ReceivedSpan], recorded: Recorded) -> None:
    assert len({span.span_id for span in spans}) == len(spans)
    by_id = {span.span_id: span for span in spans}
    roots = [span for span in spans if not span.parent_span_id]
    assert len(roots) == 24
    for span in spans:
        assert span.resource["service.name"] == "mixed"
        assert span.resource["service.version"] == "9"
        if span.parent_span_id:
            parent = by_id[span.parent_span_id]
            assert parent.trace_id == span.trace_id
            assert parent.start_ns <= span.start_ns
    for fact in recorded.of(facts.RunEnded):
        run = by_id[fact.trace.span_id]
        assert run.name == "invoke_agent staged"
        assert run.attributes["agx.run.outcome"] == fact.outcome
        children = Counter(span.name.split(" ")[0] for span in spans if span.parent_span_id == run.span_id)
        assert children["chat"] == fact.model_calls
        assert children["execute_tool"] == fact.tool_calls
        assert children["agx.stream"] == (1 if fact.stream is not None else 0)
