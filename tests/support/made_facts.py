"""Facts of one run, made with the product's own dataclasses and ids, with every field set to a value of its own.

`tests/integration/test_made_facts.py` compares them with the facts of a real run.
"""

from __future__ import annotations

from typing import Any

from agx.facts.schema import (
    CHUNK_BUCKETS,
    ModelCall,
    NodeEnded,
    ProcessState,
    RunEnded,
    RunResumed,
    RunStarted,
    Service,
    StreamEvent,
    StreamTotals,
    ToolEnded,
    Trace,
    Usage,
    node_name,
    span_id,
    tool_name,
)

T0 = 1_700_000_000_000_000_000  # ns
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
# Spans of the run `run-1`.
RUN_SPAN = span_id("run-1", "run")
CHAT_SPAN = span_id("run-1", node_name("model_request", 0))
TOOL_SPAN = span_id("run-1", tool_name(0, "call-1"))
SERVICE = Service("shop", "1.2.3", "pod-1", (("deployment.environment.name", "staging"),))


def trace(span: str = RUN_SPAN, parent: str | None = None, *, sampled: bool = True, sdk: bool = False) -> Trace:
    return Trace(TRACE_ID, span, parent, sampled, sdk)


def run_of(run_id: str = "run-1", **changes: Any) -> dict[str, Any]:
    """The fields of every fact of a run."""
    return {
        "scope": "acme",
        "user": "u1",
        "session": "s1",
        "run_id": run_id,
        "agent": "support",
        "service": SERVICE,
        "trace": trace(span_id(run_id, "run")),
        **changes,
    }


def started(run_id: str = "run-1", **changes: Any) -> RunStarted:
    return RunStarted(**{"id": f"{run_id}:start", "start_ns": T0, **run_of(run_id), **changes})


def resumed(run_id: str = "run-1", attempt: int = 2, **changes: Any) -> RunResumed:
    given = {"id": f"{run_id}:resume.{attempt}", "last_ns": T0 + 10_000, "at_ns": T0 + 2_300_010_000}
    return RunResumed(**{**given, "attempt": attempt, **run_of(run_id), **changes})


def ended(run_id: str = "run-1", **changes: Any) -> RunEnded:
    given = {
        "id": f"{run_id}:end",
        "outcome": "completed",
        "start_ns": T0,
        "end_ns": T0 + 2_500_000_000,
        "end_ms": T0 // 1_000_000 + 2_500,
        "model_calls": 2,
        "tool_calls": 1,
        "first_text_ns": 400_000_000,
        "stream": StreamTotals(events=12, bytes=3_400, retries=1, failures=0),
        "events": (
            StreamEvent(T0 + 1_000, "begin", {}),
            StreamEvent(T0 + 1_500, "part", {"idx": 0, "part_kind": "text"}),
            StreamEvent(T0 + 2_000, "end", {"outcome": "completed"}),
        ),
    }
    return RunEnded(**{**given, **run_of(run_id), **changes})


def usage(**changes: Any) -> Usage:
    given = {"input": 1_000, "output": 200, "cache_read": 300, "cache_write": 50, "reasoning": 40}
    return Usage(**{**given, **changes})


def call(**changes: Any) -> ModelCall:
    counts = [0] * (len(CHUNK_BUCKETS) + 1)
    counts[0], counts[2] = 7, 3
    given = {
        "provider": "openai",
        "request_model": "gpt-4o-mini",
        "response_model": "gpt-4o-mini-2024-07-18",
        "response_id": "resp-1",
        "stream": True,
        "finish_reason": "stop",
        "finish_reason_missing": False,
        "first_chunk_ns": 150_000_000,
        "chunk_counts": tuple(counts),
        "chunk_sum_ns": 123_456_789,
        "usage": usage(),
        "start_ns": T0 + 10_000,
        "end_ns": T0 + 600_010_000,
    }
    return ModelCall(**{**given, **changes})


def node(run_id: str = "run-1", idx: int = 0, **changes: Any) -> NodeEnded:
    """Return the fact of a node, a model request unless `node` says otherwise."""
    kind = changes.get("node", "model_request")
    given = {
        "id": f"{run_id}:{node_name(kind, idx)}",
        "node": kind,
        "idx": idx,
        "outcome": "completed",
        "start_ns": T0 + 10_000,
        "end_ns": T0 + 700_010_000,
        "model": call(),
        **run_of(run_id),
        "trace": trace(span_id(run_id, node_name("model_request", idx)), span_id(run_id, "run")),
    }
    return NodeEnded(**{**given, **changes})


def tool(run_id: str = "run-1", call_id: str = "call-1", **changes: Any) -> ToolEnded:
    name = tool_name(changes.get("idx", 0), call_id)
    given = {
        "id": f"{run_id}:{name}",
        "tool": "lookup",
        "call_id": call_id,
        "idx": 0,
        "outcome": "ok",
        "start_ns": T0 + 20_000,
        "end_ns": T0 + 30_020_000,
        **run_of(run_id),
        "trace": trace(span_id(run_id, name), span_id(run_id, "run")),
    }
    return ToolEnded(**{**given, **changes})


def heartbeat(n: int = 1, **changes: Any) -> ProcessState:
    given = {
        "id": f"{SERVICE.instance}:7f3a5c0d1e40:{n}",
        "at_ns": T0,
        "service": SERVICE,
        "listeners": 3,
        "buffered_events": 5,
        "silence_ns": 1_500_000_000,
        "gaps": 2,
        "rereads": 4,
    }
    return ProcessState(**{**given, **changes})
