"""Facts with odd fields: converted or defaulted field by field, refused only where nothing sensible is left."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from agx.facts.decoding import MalformedFactError, decode
from agx.facts.schema import (
    Fact,
    ModelCall,
    NodeEnded,
    RunEnded,
    Service,
    StreamEvent,
    Trace,
    Usage,
    encode,
)

RUN = {
    "scope": "acme",
    "user": "u",
    "session": "s",
    "run_id": "r",
    "agent": "a",
    "service": Service("shop"),
    "trace": Trace("0" * 32, "1" * 16, None, sampled=True, sdk=False),
}
CALL = ModelCall(provider="openai", request_model="m", usage=Usage(10, 20, cache_read=3), start_ns=1, end_ns=2)
NODE = NodeEnded(id="n", node="model_request", idx=0, outcome="completed", start_ns=1, end_ns=2, model=CALL, **RUN)  # type: ignore[arg-type]
END = RunEnded(id="e", outcome="completed", start_ns=1, end_ns=2, model_calls=3, **RUN)  # type: ignore[arg-type]


def changed(fact: Fact, path: str, value: Any) -> bytes:
    raw = json.loads(encode(fact))
    *outer, last = path.split(".")
    holder = raw
    for step in outer:
        holder = holder[step]
    holder[last] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model.usage.output", 5.5, 5),
        ("model.usage.output", "20", 20),
        ("model.usage.output", 2**70, 0),
        ("model.usage.output", None, 0),
        pytest.param("model.usage.cost_nano_usd", 10**400, None, id="cost-huge"),
        ("model.usage.source", "guessed", "reported"),
        ("model.usage", "many", Usage(source="missing")),
        ("model.response_id", 7, "7"),
        ("model.response_model", 4.1, "4.1"),
        ("model.request_model", None, ""),
        ("model.stream", "perhaps", False),
        pytest.param("model.first_chunk_ns", -(10**400), None, id="first_chunk_ns-huge"),
        ("model.chunk_counts", [1, 2.5, 3], (1, 2, 3)),
        ("model.chunk_counts", [1, "x", 3], ()),
        pytest.param("model.start_ns", 10**400, None, id="model.start_ns-huge"),
        ("model", 7, None),
        ("error_type", 404, "404"),
        ("service.version", 1.2, "1.2"),
        ("trace.trace_state", [], None),
    ],
)
def test_an_odd_field_is_converted_or_gets_its_default_and_the_rest_stays(path: str, value: Any, expected: Any) -> None:
    repairs: list[None] = []
    fact = decode(changed(NODE, path, value), lambda: repairs.append(None))
    assert isinstance(fact, NodeEnded)
    assert (fact.id, fact.agent, fact.end_ns) == ("n", "a", 2)
    found: Any = fact
    for step in path.split("."):
        found = getattr(found, step) if found is not None else None
    assert found == expected
    assert len(repairs) == (0 if value == "20" else 1)


def test_several_odd_fields_are_repaired_together() -> None:
    raw = json.loads(encode(END))
    raw |= {"model_calls": 2.9, "stream": {"events": 10**30, "bytes": 7}, "events": [{"at_ns": 1}], "reason": "boredom"}
    fact = decode(json.dumps(raw).encode())
    assert isinstance(fact, RunEnded)
    assert (fact.model_calls, fact.events, fact.reason) == (2, (), None)
    assert fact.stream is not None
    assert (fact.stream.events, fact.stream.bytes) == (0, 7)


def test_a_fact_is_bounded_whatever_a_model_invents() -> None:
    name = "\u00e9" * 1_000_000
    events = tuple(StreamEvent(1, "part", {"tool_name": name, "tool_call_id": name}) for _ in range(128))
    for fact in (replace(NODE, error_type=name), replace(END, events=events, agent=name)):
        data = encode(fact)
        assert len(data) < 1_000_000
        read = decode(data)
        assert (read.id, read.end_ns) == (fact.id, fact.end_ns)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("start_ns", -(10**400), id="start_ns-huge"),
        pytest.param("start_ns", int("9" * 4_299), id="start_ns-4299-digits"),
        ("end_ns", 2**63),
        ("end_ns", "yesterday"),
        ("scope", None),
        ("outcome", "vanished"),
        ("trace", None),
        ("service", {}),
    ],
)
def test_what_identifies_or_times_a_fact_must_be_readable(path: str, value: Any) -> None:
    with pytest.raises(MalformedFactError, match=path):
        decode(changed(END, path, value))


def test_the_text_of_a_number_beyond_all_measure_is_refused() -> None:
    data = encode(END).replace(b'"model_calls":3', b'"model_calls":' + b"9" * 100_000)
    with pytest.raises(MalformedFactError):
        decode(data)
