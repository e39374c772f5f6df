"""Whole traces of real runs, with the service's own SDK and without: each span told once, each token counted once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.recorded import read_recorded
from support.sdk import installed_sdk

import agx
from agx_sidecar.traces.spans import spans_of

# The model asks for a tool and is asked again; it then says all, is cancelled, or breaks off, after one word.
STAGES = {
    "completed": {},
    "cancelled": {"hold_after": 1},
    "failed": {"model_error": LookupError("made")},
}
USED = {
    "completed": {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 8},
    "cancelled": {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 6},
    "failed": {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 6},
}
GOLDEN = {
    ("completed", "no SDK"): """
invoke_agent staged INTERNAL UNSET completed
  agx.stream INTERNAL UNSET completed
  chat function::_stream CLIENT UNSET completed 50+5
  execute_tool work INTERNAL UNSET ok
  chat function::_stream CLIENT UNSET completed 50+3
""",
    ("cancelled", "no SDK"): """
invoke_agent staged INTERNAL UNSET cancelled
  agx.stream INTERNAL UNSET cancelled
  chat function::_stream CLIENT UNSET completed 50+5
  execute_tool work INTERNAL UNSET ok
  chat function::_stream CLIENT UNSET cancelled 50+1
""",
    ("failed", "no SDK"): """
invoke_agent staged INTERNAL ERROR failed LookupError
  agx.stream INTERNAL ERROR failed LookupError
  chat function::_stream CLIENT UNSET completed 50+5
  execute_tool work INTERNAL UNSET ok
  chat function::_stream CLIENT ERROR failed LookupError 50+1
""",
    ("completed", "SDK"): """
agx.run staged INTERNAL UNSET completed
  agx.stream INTERNAL UNSET completed
  invoke_agent staged INTERNAL UNSET
    agx.node user_prompt INTERNAL UNSET completed
    agx.node model_request INTERNAL UNSET completed
      chat function::_stream CLIENT UNSET 50+5
    agx.node call_tools INTERNAL UNSET completed
      execute_tool work INTERNAL UNSET
    agx.node model_request INTERNAL UNSET completed
      chat function::_stream CLIENT UNSET 50+3
    agx.node call_tools INTERNAL UNSET completed
""",
    ("cancelled", "SDK"): """
agx.run staged INTERNAL UNSET cancelled
  agx.stream INTERNAL UNSET cancelled
  invoke_agent staged INTERNAL UNSET
    agx.node user_prompt INTERNAL UNSET completed
    agx.node model_request INTERNAL UNSET completed
      chat function::_stream CLIENT UNSET 50+5
    agx.node call_tools INTERNAL UNSET completed
      execute_tool work INTERNAL UNSET
    agx.node model_request INTERNAL UNSET cancelled
      chat function::_stream CLIENT UNSET 50+1
""",
    ("failed", "SDK"): """
agx.run staged INTERNAL ERROR failed LookupError
  agx.stream INTERNAL ERROR failed LookupError
  invoke_agent staged INTERNAL ERROR
    agx.node user_prompt INTERNAL UNSET completed
    agx.node model_request INTERNAL UNSET completed
      chat function::_stream CLIENT UNSET 50+5
    agx.node call_tools INTERNAL UNSET completed
      execute_tool work INTERNAL UNSET
    agx.node model_request INTERNAL ERROR failed LookupError
      chat function::_stream CLIENT UNSET 50+1
""",
}


async def _trace(redis: Redis, outcome: str, mode: str) -> list[ReadableSpan]:
    """Play a run and return its spans, the service's and the sidecar's."""
    stage = ScriptedAgent(call_tool=True, **STAGES[outcome])  # type: ignore[arg-type] # one field each
    with installed_sdk() if mode == "SDK" else nullcontext() as own:
        running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Go on.", deps=ScopeDeps()))
        if outcome == "cancelled":
            await stage.reached.wait()
            assert await agx.cancel(1, 1, "s")
        with nullcontext() if outcome == "completed" else pytest.raises((agx.AgxCanceledError, LookupError)):
            await running
    recorded = await read_recorded(redis)
    return [*(own.ended if own else ()), *(span for fact in recorded.facts for span in spans_of(fact))]


def _drawn(spans: Iterable[ReadableSpan]) -> str:
    """Draw a trace as a tree, children in the order of their start."""
    children: dict[int | None, list[ReadableSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        children.setdefault(span.parent.span_id if span.parent else None, []).append(span)

    def lines(parent: int | None, depth: int) -> Iterable[str]:
        for span in children.get(parent, ()):
            assert span.context is not None
            yield "  " * depth + _said(span)
            yield from lines(span.context.span_id, depth + 1)

    return "\n" + "".join(f"{line}\n" for line in lines(None, 0))


def _said(span: ReadableSpan) -> str:
    shown = span.attributes or {}
    words = [span.name, span.kind.name, span.status.status_code.name]
    outcomes = ("agx.run.outcome", "agx.node.outcome", "agx.tool.outcome", "error.type")
    words += [str(shown[name]) for name in outcomes if name in shown]
    if "gen_ai.usage.input_tokens" in shown:
        words.append("+".join(str(shown[f"gen_ai.usage.{kind}_tokens"]) for kind in ("input", "output")))
    return " ".join(words)


@pytest.mark.parametrize(("outcome", "mode"), list(GOLDEN))
async def test_a_trace_is_reported_once(configured: Redis, outcome: str, mode: str) -> None:
    spans = await _trace(configured, outcome, mode)
    assert _drawn(spans) == GOLDEN[outcome, mode]
    ids = Counter(span.context.span_id for span in spans if span.context)
    assert max(ids.values()) == 1
    assert len({span.context.trace_id for span in spans if span.context}) == 1


@pytest.mark.parametrize(("outcome", "mode"), list(GOLDEN))
async def test_usage_over_all_spans_is_the_usage_once(configured: Redis, outcome: str, mode: str) -> None:
    total: Counter[str] = Counter()
    for span in await _trace(configured, outcome, mode):
        for name, value in (span.attributes or {}).items():
            if name.startswith("gen_ai.usage."):
                assert isinstance(value, int)
                total[name] += value
    assert total == USED[outcome]


CONVERSATION = "gen_ai.conversation.id"


@pytest.mark.parametrize(("outcome", "mode"), list(GOLDEN))
async def test_the_conversation_is_named_by_scope_user_and_session(configured: Redis, outcome: str, mode: str) -> None:
    """Two tenants may use the same session id; only whole ids keep their conversations apart."""
    spans = await _trace(configured, outcome, mode)
    named = {span.name.split()[0]: (span.attributes or {}).get(CONVERSATION) for span in spans}
    assert {name for name, value in named.items() if value != "1/1/s"} <= {"agx.node"}
    assert {value for value in named.values() if value is not None} == {"1/1/s"}


@pytest.mark.parametrize("mode", ["no SDK", "SDK"])
async def test_it_is_named_so_where_the_caller_drives_and_not_claimed_by_a_sub_agent(
    configured: Redis, mode: str
) -> None:
    outer, inner = ScriptedAgent(call_tool=True).agent(), ScriptedAgent().agent()
    inner.name = "inner"

    @outer.tool_plain
    async def ask() -> str:
        await inner.run("Well?", capabilities=[agx.AgxCapability()])
        return "done"

    with installed_sdk() if mode == "SDK" else nullcontext() as own:
        await outer.run("Go on.", deps=ScopeDeps(), capabilities=[agx.AgxCapability()])
    recorded = await read_recorded(configured)
    spans = [*(own.ended if own else ()), *(span for fact in recorded.facts for span in spans_of(fact))]
    said = {(span.name, (span.attributes or {}).get(CONVERSATION)) for span in spans}
    of_run = {name for name, value in said if value == "1/1/s"}
    assert not any("inner" in name for name in of_run)
    assert of_run >= {"invoke_agent staged", "chat function::_stream", "execute_tool work", "agx.stream"}
