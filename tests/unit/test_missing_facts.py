"""What is missing of a run whose processes died: each step once, with the tokens that the provider bills."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import orjson
import pytest
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, ToolCallPart, UserPromptPart
from pydantic_ai.usage import RequestUsage

from agx.checkpoints.codec import Checkpoint, encode
from agx.facts.schema import ModelCall, NodeEnded, RunEnded, RunStarted, ToolEnded, Usage
from agx.model_calls.usage import read_usage
from agx.recovery.missing_facts import MissingFacts, find_missing_facts
from agx.recovery.recorded_run import RecordedRun
from agx.redis.keys import SessionKeys
from agx.stream.entry import StreamEntry

SESSION = SessionKeys.of("agx", 1, 1, "s")
TRACE, SPAN = "a" * 32, "b" * 16
CONVERSATION: list[ModelMessage] = [ModelRequest(parts=[UserPromptPart("x" * 400)])]
ANSWER = ModelResponse(
    parts=[ToolCallPart("look", {}, "c1"), ToolCallPart("look", {}, "c2")],
    usage=RequestUsage(input_tokens=70, output_tokens=9),
    model_name="m-2026",
)


def _entry(at_ms: int, type: str, checkpoint: bytes | None = None, **body: Any) -> StreamEntry:
    origin = b"pydantic-ai" if type == "event" else b"opale"
    fields = {b"type": type.encode(), b"origin": origin, b"body": orjson.dumps(body)}
    if checkpoint is not None:
        fields[b"ck"] = checkpoint
    return StreamEntry.of(f"{at_ms}-0".encode(), fields)


def _call(at_ms: int, call_id: str) -> StreamEntry:
    return _entry(at_ms, "event", idx=0, event="part", part_kind="tool-call", tool_call_id=call_id, tool_name="look")


BEGIN = _entry(1_000, "begin", run_id="r", traceparent=f"00-{TRACE}-{SPAN}-01", agent="a", service="web", seq=0)
ASKED = _entry(1_100, "event", encode(Checkpoint(chars=400)), idx=0, event="llm-begin", model="m", provider="p")
ANSWERED = [
    BEGIN,
    ASKED,
    _call(1_200, "c1"),
    _call(1_200, "c2"),
    _entry(1_300, "event", encode(Checkpoint(messages=(*CONVERSATION, ANSWER))), idx=0, event="llm-end"),
    _entry(1_400, "event", idx=0, event="part", part_kind="tool-return", tool_call_id="c1", tool_outcome="ok"),
]


def _find(*entries: StreamEntry, queued: Any = ()) -> MissingFacts:
    missing = find_missing_facts(SESSION, "r", RecordedRun.of("r", entries), queued)
    assert missing is not None
    return missing


def _call_of(*entries: StreamEntry) -> ModelCall:
    (request,) = _find(BEGIN, ASKED, *entries).steps
    assert isinstance(request, NodeEnded)
    assert request.model is not None
    return request.model


def test_an_answered_request_has_the_tokens_that_the_model_reported() -> None:
    request, *tools = _find(*ANSWERED).steps
    assert isinstance(request, NodeEnded)
    assert request.model is not None
    assert (request.outcome, request.model.usage.source, request.model.response_model) == (
        "completed", "reported", "m-2026",
    )  # fmt: skip
    assert (request.model.usage.input, request.model.usage.output) == (70, 9)
    ends = [(tool.call_id, tool.outcome, tool.error_type) for tool in tools if isinstance(tool, ToolEnded)]
    assert ends == [("c1", "ok", None), ("c2", "error", "lost")]


def test_what_the_model_reported_is_read_without_pydantic_ai() -> None:
    answered = replace(ANSWER, provider_response_id="id-1", finish_reason="tool_call")
    answered.usage.cost = Decimal("0.0021")
    answered.usage.details = {"thoughts_tokens": 4}
    checkpoint = encode(Checkpoint(messages=(*CONVERSATION, answered)))
    found = _call_of(_entry(1_300, "event", checkpoint, idx=0, event="llm-end"))
    assert found.usage == read_usage(answered.usage)
    assert (found.response_model, found.response_id, found.finish_reason) == ("m-2026", "id-1", "tool_call")


def test_an_interrupted_request_is_estimated_and_marked() -> None:
    missing = _find(
        BEGIN,
        ASKED,
        _entry(1_200, "event", idx=0, event="part_start", part_kind="text", content="1234"),
        _entry(1_300, "event", idx=0, event="part_delta", content_delta="5678"),
    )
    (request,) = missing.steps
    assert isinstance(request, NodeEnded)
    assert request.model is not None
    assert (request.outcome, request.error_type, request.model.usage.source) == ("lost", "lost", "estimated")
    assert (request.model.usage.input, request.model.usage.output) == (100, 2)
    assert request.end_ns == 1_300_000_000


def test_an_interrupted_request_has_the_size_that_a_successor_sends_again() -> None:
    delta = _entry(1_200, "event", idx=0, event="part_start", part_kind="text", content="1234")
    missing = find_missing_facts(SESSION, "r", RecordedRun.of("r", [BEGIN, ASKED, delta]), (), sent_chars=4_000)
    assert missing is not None
    assert [step.model and step.model.usage.input for step in missing.steps if isinstance(step, NodeEnded)] == [1_000]


@pytest.mark.parametrize("checkpoint", [None, b"{", b"[]", b"{}", b'{"chars": []}', b'{"chars": null}'])
def test_a_request_whose_size_is_unknown_has_no_estimate(checkpoint: bytes | None) -> None:
    asked = _entry(1_100, "event", checkpoint, idx=0, event="llm-begin", model="m", provider="p")
    (request,) = _find(BEGIN, asked).steps
    assert isinstance(request, NodeEnded)
    assert request.model is not None
    assert request.model.usage.source == "missing"


def test_what_is_queued_is_not_missing() -> None:
    first = _find(*ANSWERED)
    assert isinstance(first.facts[0], RunStarted)
    again = _find(*ANSWERED, queued=first.facts)
    assert again.facts == ()
    assert again.all_steps == first.steps


def test_facts_of_another_session_s_run_with_the_same_id_are_not_taken_for_the_run_s() -> None:
    facts = _find(*ANSWERED).facts
    others = [replace(fact, **ids) for ids in ({"scope": "other"}, {"session": "other"}) for fact in facts]
    assert _find(*ANSWERED, queued=others).facts == facts


def test_a_step_of_an_earlier_attempt_ends_with_its_attempt() -> None:
    resume = _entry(9_000, "resume", run_id="r", attempt=2, traceparent=f"00-{TRACE}-{'c' * 16}-01", void=None)
    missing = _find(*ANSWERED, resume, _entry(9_500, "event", idx=1, event="llm-begin", model="m", provider="p"))
    ends = {step.id: step.end_ns for step in missing.steps}
    assert sorted(ends.values()) == [1_300_000_000, 1_400_000_000, 1_400_000_000, 9_500_000_000]
    assert len(ends) == len(missing.steps)


def test_a_checkpoint_that_cannot_be_read_leaves_an_estimate() -> None:
    for checkpoint in (b"", b"{}", b'{"messages": []}', b'{"messages": [{"kind": "other"}]}', b"\xff"):
        entries = [*ANSWERED[:4], _entry(1_300, "event", checkpoint, idx=0, event="llm-end")]
        request = _find(*entries).steps[0]
        assert isinstance(request, NodeEnded)
        assert request.model is not None
        assert request.model.usage.source == "estimated"


def test_the_last_attempt_s_place_in_the_trace_is_known() -> None:
    own, run = "c" * 16, f"00-{TRACE}-{SPAN}-01"
    record = RecordedRun.of("r", ANSWERED)
    assert record.last_attempt is not None
    assert (record.last_attempt.trace.span_id, record.last_attempt.start_ns) == (SPAN, 1_000_000_000)
    for traceparent, span, start_ns in [(f"00-{TRACE}-{own}-01", own, 9_000_000_000), (run, SPAN, 1_000_000_000)]:
        resume = _entry(9_000, "resume", run_id="r", attempt=2, traceparent=traceparent, void=None)
        place = RecordedRun.of("r", [*ANSWERED, resume]).last_attempt
        assert place is not None
        assert (place.trace.span_id, place.start_ns) == (span, start_ns)
        assert place.trace.parent_span_id == (SPAN if span == own else None)


def test_a_response_without_usage_is_estimated() -> None:
    silent = ModelResponse(parts=[TextPart("hello")])
    found = _call_of(_entry(1_300, "event", encode(Checkpoint(messages=(silent,))), idx=0, event="llm-end"))
    assert found.usage.source == "estimated"


def _sub(at_ms: int, run: str, event: str, parent: str = "r", call_id: str = "c1", **body: Any) -> StreamEntry:
    tags = {"run": run, "parent_run": parent, "agent": f"agent {run}", "parent_tool_call_id": call_id, "depth": 1}
    fields = {b"type": b"event", b"origin": b"sub-agent", b"body": orjson.dumps({"event": event, **body, **tags})}
    return StreamEntry.of(f"{at_ms}-0".encode(), fields)


# `in` is asked in the call c1, asks a tool in which `deep` runs, and is asked again; `aside` has ended.
WORKING = [
    *ANSWERED[:5],
    _sub(1_310, "in", "run-begin"),
    _sub(1_320, "in", "llm-begin", idx=0, model="m2", provider="p2"),
    _sub(1_330, "in", "part_start", idx=0, part_kind="tool-call", tool_call_id="t", tool_name="dig", args={"q": 1}),
    _sub(1_340, "in", "llm-end", idx=0),
    _sub(1_350, "deep", "llm-begin", "in", "t", idx=0, model="m3", provider="p3"),
    _sub(1_360, "deep", "part_start", "in", "t", idx=0, part_kind="text", content="12345678"),
    _sub(1_370, "aside", "run-begin", call_id="c2"),
    _sub(1_380, "aside", "run-end", call_id="c2", outcome="completed"),
]


def test_the_requests_of_sub_agents_are_estimated_and_marked() -> None:
    found = _find(*WORKING)
    nodes = {fact.run_id: fact for fact in found.sub_agents if isinstance(fact, NodeEnded)}
    sent = {
        run: (node.outcome, node.model and (node.model.request_model, node.model.usage)) for run, node in nodes.items()
    }
    asked = len('{"q":1}')
    assert sent == {
        "in": ("completed", ("m2", Usage(source="estimated"))),
        "deep": ("lost", ("m3", Usage(input=-(-asked // 4), output=2, source="estimated"))),
    }
    assert all(node.agent == f"agent {run}" for run, node in nodes.items())
    tools = [(tool.run_id, tool.tool, tool.outcome) for tool in found.sub_agents if isinstance(tool, ToolEnded)]
    assert tools == [("in", "dig", "error")]
    ends = {
        end.run_id: (end.outcome, end.model_calls, end.tool_calls)
        for end in found.sub_agents
        if isinstance(end, RunEnded)
    }
    assert ends == {"in": ("lost", 1, 1), "deep": ("lost", 1, 0), "aside": ("completed", 0, 0)}
    assert {fact.parent_run_id for fact in found.sub_agents if fact.run_id == "deep"} == {"in"}
    assert len({fact.id for fact in found.facts}) == len(found.facts)
    assert [fact.run_id for fact in found.all_steps] == ["r"] * len(found.all_steps)
    assert _find(*WORKING, queued=found.facts).facts == ()


def test_sub_agents_are_void_while_their_call_has_no_result() -> None:
    def void(*entries: StreamEntry) -> list[str]:
        return [one.run_id for one in RecordedRun.of("r", entries).sub_agents if one.is_under_way]

    returned = [
        _entry(1_400, "event", idx=0, event="part", part_kind="tool-return", tool_call_id=call_id)
        for call_id in ("c1", "c2")
    ]
    assert void(*WORKING) == ["in", "deep", "aside"]
    assert void(*WORKING, returned[1]) == ["in", "deep"]
    assert void(*WORKING, returned[0]) == ["aside"]
    assert void(*WORKING, _sub(1_390, "in", "part_start", part_kind="tool-return", tool_call_id="c1")) == void(*WORKING)
    resume = _entry(1_500, "resume", run_id="r", attempt=2, void=None, void_runs=void(*WORKING))
    assert void(*WORKING, resume) == []
    assert void(*WORKING, resume, _sub(1_600, "new", "run-begin")) == ["new"]
