"""Two replicas of a service whose router has recipes: one is killed, and the other goes on with its runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from support.docs import Blocks
from support.model_server import Finish, ModelServer, Silence, Text, say
from support.waiting import wait_until_sync
from support.web import WebService, read_events, running_service, text_of

from agx.sessions.redis_session import RedisSessions
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router

PAGE = "docs/how-to/fastapi.md"
LEASE = "lease_ttl=2"


@pytest.fixture
def replicas(redis_url: str, model_server: ModelServer, tmp_path: Path) -> Iterator[list[WebService]]:
    code = Blocks(PAGE).take("python", "recipes=")
    service = Blocks(PAGE).take("python").replace('service_name="chat"', LEASE)
    assert LEASE in service
    with ExitStack() as stack:
        started = []
        for name in ("one", "two"):
            (home := tmp_path / name).mkdir()
            extra = {"replicas.py": code, "service.py": service}
            started.append(stack.enter_context(running_service("replicas", home, redis_url, model_server, extra)))
        yield started


def test_the_other_replica_goes_on_with_a_run(replicas: list[WebService], model_server: ModelServer) -> None:
    first, second = replicas
    for replica in replicas:  # the first request of a process imports the model's client, which blocks its event loop
        model_server.script(say("Hello"))
        replica.start("warm-up", "Hi")
        replica.client.get("/api/sessions/warm-up/events")
    model_server.script((Text("half "), Silence(), Finish()), say("The whole answer"))
    run_id = first.start("s", "Tell me")
    wait_until_sync(lambda: model_server.silent)
    with second.client.stream("GET", "/api/sessions/s/events") as response:
        events = read_events(response)
        found = [next(events)]
        first.end(SIGKILL)
        found += events
    types = [event["type"] for event in found]
    assert [types.count(kind) for kind in ("begin", "resume", "end")] == [1, 1, 1]
    assert found[-1]["body"] == {"run_id": run_id, "outcome": "completed", "reason": None, "seq": len(found) - 1}
    assert text_of(found[types.index("resume") :]) == "The whole answer"

    kept = second.client.get("/api/sessions/s/messages").json()
    assert read_messages(kept) == ["Tell me", "The whole answer"]
    assert (kept["run_id"], kept["live"]) == (run_id, False)
    model_server.script(say("And more"))
    second.start("s", "More")
    second.client.get("/api/sessions/s/events")
    kept = second.client.get("/api/sessions/s/messages").json()
    assert read_messages(kept) == ["Tell me", "The whole answer", "More", "And more"]


def read_messages(kept: Any) -> list[str]:
    return [part["content"] for message in kept["messages"] for part in message["parts"]]


@pytest.mark.parametrize("make", [make_router, make_vercel_ai_router, make_ag_ui_router])
def test_the_agent_needs_a_recipe_of_its_name(make: Any) -> None:
    agent = Agent(TestModel(), name="helper")
    with pytest.raises(ValueError, match="helper"):
        make(agent, authorize=dict, sessions=RedisSessions(), recipes={"other": dict})
