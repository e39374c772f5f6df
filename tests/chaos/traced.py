"""The spans that the collector got, held against the facts: none missing, each told once and by one side."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from support.otlp import ReceivedSpan

from agx.facts import schema as facts

from .world import World


def missing_spans(world: World, told: dict[str, facts.Fact]) -> list[str]:
    """Return what is missing; what an SDK held when it was killed is nobody's."""
    received = {span.span_id for span in world.otlp.spans}
    by_trace: dict[str, Counter[str]] = defaultdict(Counter)
    for span in world.otlp.spans:
        by_trace[span.trace_id][span.name.split(" ")[0]] += 1
    missing = []
    for fact in told.values():
        missing += [f"{fact.id}: span {span_id} missing" for span_id in _expected(world, fact) - received]
        if isinstance(fact, facts.RunEnded) and fact.trace.sdk and fact.outcome == "completed" and _left(world, fact):
            names = by_trace[fact.trace.trace_id]
            if (names["chat"], names["execute_tool"]) != (fact.model_calls, fact.tool_calls):
                missing.append(f"{fact.id}: its SDK told {dict(names)}")
    return missing


def _expected(world: World, fact: facts.Fact) -> set[str]:
    if isinstance(fact, facts.RunEnded):
        stream = facts.stream_span_id(fact.run_id)
        if not fact.trace.sdk or fact.partial or _left(world, fact):
            return {fact.trace.span_id, stream}
        return {stream}
    if isinstance(fact, facts.ToolEnded) or (isinstance(fact, facts.NodeEnded) and fact.model is not None):
        return set() if fact.trace.sdk else {fact.trace.span_id}
    return set()


def _left(world: World, fact: facts.RunEnded) -> bool:
    """Whether the process of a run left by itself."""
    return str(fact.session).split("-", maxsplit=1)[0] not in world.killed_at


def repeated_spans(world: World) -> str:
    """Say how many spans came again, under the same ids; nothing if none did."""
    spans = world.otlp.spans
    told = {(span.trace_id, span.span_id) for span in spans}
    return f"{len(spans) - len(told)} of {len(told)} spans came again" if len(spans) > len(told) else ""


def doubled_spans(world: World, told: dict[str, facts.Fact], *, once: bool) -> list[str]:
    """Return what was told twice: two spans for one thing, or two stories under one id; with `once` any repeat."""
    ended = {fact.trace.trace_id: fact for fact in told.values() if isinstance(fact, facts.RunEnded)}
    by_run: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in world.otlp.spans:
        by_run[span.trace_id].append(span)
    return [
        f"{fact.id}: {wrong}"
        for trace_id, fact in ended.items()
        for wrong in _doubles(by_run[trace_id], fact, once=once)
    ]


def _doubles(spans: list[ReceivedSpan], run: facts.RunEnded, *, once: bool) -> Iterable[str]:
    copies: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        copies[span.span_id].append(span)
    for same in copies.values():
        stories = {(span.name, str(span.attributes.get("agx.run.outcome"))) for span in same}
        if len(stories) > 1:
            yield f"one id, told as {sorted(stories)}"
        elif once and len(same) > 1:
            yield f"{same[0].name} came {len(same)} times"
    roots = Counter(same[0].name.split(" ")[0] for same in copies.values())
    if roots["agx.stream"] > 1 or roots["agx.run"] > int(run.trace.sdk) or roots["invoke_agent"] > 1:
        yield f"too many of {dict(roots)}"
