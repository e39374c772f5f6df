"""The tests' own counterparts do what they say: a fault that does not happen would prove nothing."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from support.leaks import leak_checked
from support.model_server import CleanCut, Finish, HardCut, ModelServer, Refusal, Silence, Text, call, say
from support.otlp import OtlpReceiver
from support.waiting import wait_until, wait_until_sync


async def stream(agent: Agent[None, str], prompt: str = "hi") -> tuple[list[str], ModelResponse]:
    deltas: list[str] = []
    async with agent.run_stream(prompt) as result:
        deltas = [delta async for delta in result.stream_text(delta=True, debounce_by=None)]
        response = result.response
    return deltas, response


async def test_model_streams_text_and_usage(model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    model_server.script(say("one two three"))
    deltas, response = await stream(Agent(http_model))
    assert deltas == ["one", " two", " three"]
    assert (response.usage.input_tokens, response.usage.output_tokens) == (10, 3)
    assert response.provider_details is not None
    assert response.provider_details["finish_reason"] == "stop"


async def test_model_calls_a_tool_with_split_arguments(model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    agent = Agent(http_model)

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        return a + b

    model_server.script(call("add", '{"a": 1', ', "b"', ": 2}"), say("three"))
    assert (await agent.run("1 + 2")).output == "three"
    assert model_server.requests[1].body["messages"][-1]["content"] == "3"


@pytest.mark.parametrize("status", [429, 503])
async def test_model_refuses(model_server: ModelServer, http_model: OpenAIChatModel, status: int) -> None:
    model_server.script((Refusal(status),))
    with pytest.raises(ModelHTTPError) as caught:
        await Agent(http_model).run("hi")
    assert caught.value.status_code == status


async def test_model_reset_in_the_middle_raises(model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    model_server.script((Text("half an"), HardCut()))
    with pytest.raises(Exception, match=r"(?i)connection|read|peer"):
        await stream(Agent(http_model))


async def test_model_cut_cleanly_has_no_raw_finish_reason(
    model_server: ModelServer, http_model: OpenAIChatModel
) -> None:
    model_server.script((Text("half an"), CleanCut()))
    deltas, response = await stream(Agent(http_model))
    assert deltas == ["half an"]
    assert "finish_reason" not in (response.provider_details or {})


async def test_model_is_silent_until_released(model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    model_server.script((Text("a"), Silence(), Text("b"), Finish()))
    running = asyncio.create_task(stream(Agent(http_model)))
    await wait_until(lambda: model_server.silent)
    model_server.release()
    assert (await running)[0] == ["a", "b"]


async def test_model_notices_a_client_that_goes_away(model_server: ModelServer, http_model: OpenAIChatModel) -> None:
    model_server.script((Text("a"), Silence()))
    running = asyncio.create_task(stream(Agent(http_model)))
    await wait_until(lambda: model_server.silent)
    running.cancel()
    await wait_until(lambda: model_server.disconnects)


def export_one(exporter: SpanExporter, name: str) -> None:
    provider = TracerProvider(resource=Resource({"service.name": "tested"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("scope").start_as_current_span(name, attributes={"n": 1, "many": ["a", "b"]}) as span:
        span.add_event("happened", {"x": True})
    provider.shutdown()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_receiver_decodes_spans(otlp: OtlpReceiver, protocol: str) -> None:
    exporter: SpanExporter
    if protocol == "http":
        exporter = HttpExporter(f"{otlp.endpoint_http}/v1/traces", headers={"X-Key": "k"}, compression=Compression.Gzip)
    else:
        exporter = GrpcExporter(otlp.endpoint_grpc, headers={"x-key": "k"})
    export_one(exporter, "one")
    (span,) = otlp.spans
    assert (span.name, span.kind, span.status, span.parent_span_id) == ("one", "INTERNAL", "UNSET", None)
    assert span.attributes == {"n": 1, "many": ["a", "b"]}
    assert [(event.name, event.attributes) for event in span.events] == [("happened", {"x": True})]
    assert span.resource["service.name"] == "tested"
    assert span.end_ns >= span.start_ns > 0
    assert (otlp.exports[0].protocol, otlp.exports[0].headers["x-key"]) == (protocol, "k")


def test_receiver_refuses_what_it_is_configured_to_refuse(otlp: OtlpReceiver) -> None:
    otlp.fail_with(400, when=lambda span: span.name == "poison")
    for name in ("fine", "poison"):
        export_one(HttpExporter(f"{otlp.endpoint_http}/v1/traces"), name)
    otlp.recover()
    export_one(HttpExporter(f"{otlp.endpoint_http}/v1/traces"), "poison")
    assert [span.name for span in otlp.spans] == ["fine", "poison"]
    assert len(otlp.exports) == 3


def test_a_key_without_ttl_is_a_leak(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        with pytest.raises(AssertionError, match=r"\['lasting'\]"), leak_checked(redis_url):
            client.transaction(lambda both: both.set("lasting", 1).set("passing", 1, ex=60))
        client.delete("lasting")


async def test_any_client_has_what_its_name_says(any_client: AsyncRedis) -> None:
    assert await any_client.set("key", "value", ex=60)
    assert await any_client.get("key") in {"value", b"value"}


async def test_waiting_fails_with_what_it_waited_for() -> None:
    with pytest.raises(AssertionError, match="pigs fly"):
        await wait_until(lambda: False, 0, what="pigs fly")
    empty: list[int] = []
    with pytest.raises(AssertionError, match="len"):
        wait_until_sync(lambda: len(empty), 0)
