"""The catalogue of events: its page, its schema, and real runs, all of whose events are in it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.models.function import DeltaThinkingPart, DeltaToolCall, FunctionModel
from pydantic_ai.tools import DeferredToolRequests
from redis.asyncio import Redis
from support.agents import ScopeDeps

import agx
from agx.listeners.event_catalogue import EVENTS, EventKind, event_schema
from agx.sessions.redis_session import RedisSessions
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router


def kind_of(event: dict[str, Any]) -> EventKind:
    """Return the kind whose constants an event has; a user's own origin is the last resort."""
    for kind in sorted(EVENTS, key=lambda kind: (not kind.origin, -len(kind.constants))):
        named = {"type": kind.type, "origin": kind.origin or event["origin"]}
        if named.items() <= event.items() and kind.constants.items() <= event["body"].items():
            return kind
    raise AssertionError(f"not in the catalogue: {event}")


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.name)
def test_an_example_is_of_its_kind(kind: EventKind) -> None:
    event = {"id": "1-0", "type": kind.type, "origin": kind.origin or "mine", "body": kind.body}
    jsonschema.validate(event, kind.to_schema())
    jsonschema.validate(event, event_schema())
    has_all = kind.body.keys() <= {one.name for one in kind.fields} | kind.constants.keys()
    assert has_all or not kind.fields or kind.name == "of a sub-agent"
    for name in [one.name for one in kind.fields if one.required]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(event | {"body": {k: v for k, v in kind.body.items() if k != name}}, kind.to_schema())


async def say(messages: list[Any], info: Any) -> Any:
    yield "Done"
    yield "."


async def answer(messages: list[Any], info: Any) -> Any:
    if len(messages) == 1:
        yield {0: DeltaThinkingPart(content="Hm")}
        yield {1: DeltaToolCall(name="look", json_args="{}", tool_call_id="call_1")}
    else:
        yield {0: DeltaToolCall(name="delete", json_args="{}", tool_call_id="call_2")}


async def test_every_event_of_a_run_is_in_the_catalogue(configured: Redis) -> None:
    agent = Agent(FunctionModel(stream_function=answer), deps_type=ScopeDeps, output_type=[str, DeferredToolRequests])

    scout = Agent(FunctionModel(stream_function=say), name="scout", capabilities=[agx.AgxCapability()])

    @agent.tool
    async def look(ctx: RunContext[ScopeDeps]) -> str:
        await ctx.deps.add_info({"looking": "attic"}, origin="tools")
        await ctx.deps.add_error({"msg": "closed"}, origin="tools")
        await scout.run("Where?")
        raise ModelRetry("again")

    @agent.tool_plain(requires_approval=True)
    def delete() -> str:
        return "deleted"

    async def fail(messages: list[Any], info: Any) -> Any:
        yield "Half"
        raise RuntimeError

    failing = Agent(FunctionModel(stream_function=fail), deps_type=ScopeDeps)
    found = set()
    for session, one in (("a", agent), ("b", failing), ("c", Agent(FunctionModel(stream_function=say), name="say"))):
        with suppress(RuntimeError):
            await agx.run(agx.RedisSession(1, 1, session), one, "Hi", ScopeDeps(session_id=session))
        async for event in agx.listen(1, 1, session, serialize=False):
            jsonschema.validate(event, (kind := kind_of(event)).to_schema())
            found.add(kind.name)
    rare = {"prompt", "part_start: file", "custom", "resume", "gap"}
    assert found == {kind.name for kind in EVENTS} - rare


def test_the_openapi_has_the_schema_and_stable_operation_ids() -> None:
    app = FastAPI()
    asked = {"authorize": lambda: ("acme", "ada"), "sessions": RedisSessions()}
    app.include_router(make_router(Agent("test"), **asked), prefix="/api")
    app.include_router(make_vercel_ai_router(Agent("test"), **asked), prefix="/api/chat")
    app.include_router(make_ag_ui_router(Agent("test"), **asked), prefix="/api/ag-ui")
    paths = app.openapi()["paths"]
    ids = [one["operationId"] for path in paths.values() for one in path.values()]
    assert {"api_start_run", "api_cancel_run", "api_chat_cancel_run", "api_ag_ui_cancel_run"} <= set(ids)
    assert {"api_rename_conversation", "api_branch_conversation", "api_delete_conversation"} <= set(ids)
    assert len(ids) == len(set(ids))
    events = paths["/api/sessions/{session_id}/events"]["get"]["responses"]["200"]
    data = events["content"]["text/event-stream"]["schema"]["properties"]["data"]
    assert data["contentSchema"] == event_schema()
    with TestClient(app) as client:
        assert client.get("/api/events.schema.json").json() == event_schema()
