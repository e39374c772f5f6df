"""The facts that tests make have the shape of those that a real run emits: kinds, fields, ids, spans and events."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis
from support import made_facts as made
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.recorded import read_facts
from support.waiting import wait_until

import agx
from agx.facts.schema import (
    Fact,
    NodeEnded,
    RunEnded,
    RunFact,
    RunStarted,
    node_name,
    tool_name,
)

MADE: tuple[Fact, ...] = (
    made.started(),
    made.node(idx=0),
    made.tool(),
    made.node(idx=0, node="call_tools", model=None, trace=made.trace()),
    made.node(idx=1),
    made.ended(),
    made.heartbeat(),
)


async def real_facts(client: Redis) -> list[Fact]:
    """Run an agent that calls its tool once; return all facts, the process's own included."""
    await agx.run(FakeSession(), ScriptedAgent(call_tool=True).agent(), "Hello", deps=ScopeDeps())
    await agx.aclose()  # emits the process's last heartbeat
    return await wait_until(lambda: read_facts(client))


def shape(value: Any) -> Any:
    """Return the names of the fields, and for each its type, at every depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: shape(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple
    return type(value)


def kind_of(fact: Fact) -> str:
    return f"{fact.node} {fact.idx}" if isinstance(fact, NodeEnded) else fact.kind


def own_id(fact: Fact) -> str:
    """Return a fact's id without the part that names its run or process."""
    if isinstance(fact, RunFact):
        prefix = f"{fact.run_id}:"
        assert fact.id.startswith(prefix)
        return fact.id[len(prefix) :]
    return re.sub(r"[0-9a-f]+:[0-9]+$", "N:N", fact.id.removeprefix(f"{fact.service.instance}:"))


def described(facts: Iterable[Fact]) -> dict[str, tuple[Any, str]]:
    return {kind_of(fact): (shape(fact), own_id(fact)) for fact in facts}


def positions(facts: Iterable[Fact]) -> dict[str, tuple[str, str | None]]:
    """Return for each fact of a run whose span it has, and whose span is above."""
    run_id = next(fact.run_id for fact in facts if isinstance(fact, RunStarted))
    names = ("run", node_name("model_request", 0), node_name("model_request", 1), tool_name(0, "call-1"))
    spans = {made.span_id(run_id, name): name for name in names}
    return {
        kind_of(fact): (spans[fact.trace.span_id], spans.get(fact.trace.parent_span_id or ""))
        for fact in facts
        if isinstance(fact, RunFact)
    }


# What the scripted model and the test's service do not report: there a real value is None.
NOT_REPORTED = {"version", "response_id", "finish_reason"}


def reported(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: reported(value) for name, value in shapes.items() if name not in NOT_REPORTED}
    return shapes


async def test_made_facts_have_the_shape_of_real_ones(configured: Redis) -> None:
    real, by_hand = described(await real_facts(configured)), described(MADE)
    for kind, (fields, own) in by_hand.items():
        assert kind in real
        assert own == real[kind][1]
        assert reported(fields) == reported(real[kind][0]), kind


async def test_made_facts_have_the_spans_of_real_ones(configured: Redis) -> None:
    real, by_hand = positions(await real_facts(configured)), positions(MADE)
    assert by_hand == {kind: real[kind] for kind in by_hand}


async def test_made_events_are_events_of_a_real_run(configured: Redis) -> None:
    (end,) = (fact for fact in await real_facts(configured) if isinstance(fact, RunEnded))
    real = {(event.name, frozenset(event.attributes)) for event in end.events}
    assert {(event.name, frozenset(event.attributes)) for event in made.ended().events} <= real
