"""AG-UI through its official client: runs, approvals, the front end's tools and state, a run that is taken over."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from support.ag_ui import AgUi, contents, install_client
from support.docs import Blocks
from support.leaks import leak_checked
from support.model_server import Finish, ModelServer, Refusal, Silence, Text, ToolCall, call, say
from support.waiting import wait_until_sync
from support.web import WebService, running_service

from agx.embedded.server import EmbeddedServer
from agx.error_codes import MODEL_FAILED

pytestmark = [pytest.mark.npm, pytest.mark.timeout(240)]

DELETE = (Text("I will. "), ToolCall("delete", ('{"path": "/a"}',)), Finish("tool_calls"))

# A router with recipes; the agent has tools for the front end and its state.
SERVED = """
import asyncio
from dataclasses import dataclass, field

import agx
import service
from ag_ui.core import StateSnapshotEvent
from agx.web import make_ag_ui_router
from fastapi import FastAPI
from pydantic_ai import Agent, DeferredToolRequests, ToolReturn
from pydantic_ai.models.function import DeltaToolCall, FunctionModel
from redis.asyncio import Redis
from service import agent, authorize, lifespan, sessions


@dataclass(kw_only=True)
class PageDeps(agx.Deps):
    scope: str
    state: dict = field(default_factory=dict)

    def get_scope_id(self) -> str:
        return self.scope


@agent.tool
async def look(ctx, where: str) -> str:
    await ctx.deps.add_info({"looking": where})
    return f"nothing in {where}"


@agent.tool(requires_approval=True)
async def delete(ctx, path: str) -> str:
    return f"{path} deleted"


@agent.tool
async def paint(ctx) -> ToolReturn:
    painted = {**ctx.deps.state, "painted": True}
    return ToolReturn(ctx.deps.state["color"], metadata=[StateSnapshotEvent(snapshot=painted)])


async def find(messages, info):
    yield "found "
    yield messages[0].parts[-1].content


async def split(messages, info):
    place = messages[0].parts[-1].content
    if len(messages) == 1:
        for n in range(3):
            yield {n: DeltaToolCall("dig", f'{{"place": "{place}{n}"}}', tool_call_id=f"dig-{place}{n}")}
    else:
        yield f"all of {place}"


leaf = Agent(FunctionModel(stream_function=find), name="leaf", capabilities=[agx.AgxCapability()])
middle = Agent(FunctionModel(stream_function=split), name="middle", capabilities=[agx.AgxCapability()])


@middle.tool_plain
async def dig(place: str) -> str:
    return (await leaf.run(place)).output


@agent.tool_plain
async def explore() -> list[str]:
    return [run.output for run in await asyncio.gather(*(middle.run(place) for place in "abc"))]


def make_deps(scope, user, session):
    return PageDeps(scope=scope, user_id=user, session_id=session)


async def make_helper(job: agx.Job) -> agx.Call:
    ids = (job.scope_id, job.user_id, job.session_id)
    return agx.Call(sessions.open(*ids), agent, make_deps(*ids), {"output_type": [str, DeferredToolRequests]})


app = FastAPI(lifespan=lifespan)
router = make_ag_ui_router(
    agent, authorize=authorize, sessions=sessions, make_deps=make_deps, recipes={"helper": make_helper},
    keep_alive=0.02, output_type=[str, DeferredToolRequests],
)
app.include_router(router, prefix="/api/ag-ui")
"""


@pytest.fixture(scope="module")
def front_end() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="agx-ag-ui-") as directory:
        install_client(home := Path(directory))
        yield home


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    lease = 'service_name="chat"'
    code = Blocks("docs/how-to/fastapi.md").take("python")
    assert lease in code
    return {"served.py": SERVED, "service.py": code.replace(lease, "lease_ttl=3")}


@pytest.fixture(scope="module")
def service(
    server: EmbeddedServer,
    shared_model_server: ModelServer,
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, str],
) -> Iterator[WebService]:
    """One service for the file: its Redis is not emptied between tests, and each test has a session of its own."""
    home = tmp_path_factory.mktemp("ag-ui")
    with leak_checked(server.url) as url, running_service("served", home, url, shared_model_server, files) as service:
        yield service


PICK = {
    "name": "pick_color",
    "description": "Ask the user for a color.",
    "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
}


def tools_of(request: Any) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"] for tool in request.body["tools"]}


def test_the_agent_calls_a_tool_of_the_front_end(
    service: WebService, model_server: ModelServer, front_end: Path, session: str
) -> None:
    model_server.script(call("pick_color", '{"of": "door"}'), say("Blue it is."))
    given = json.dumps({"tools": [PICK]})
    asking = AgUi(front_end, service, "ask", session, "Which color?", given)
    assert asking.until("RUN_FINISHED")["outcome"] == {"type": "success", "pendingToolCallIds": ["call_1"]}
    asking.finish()
    tool = tools_of(model_server.requests[0])["pick_color"]
    assert (tool["description"], tool["parameters"]["required"]) == (PICK["description"], ["of"])

    answering = AgUi(front_end, service, "answer", session, json.dumps({"call_1": "blue"}), given)
    said = contents(answering.finish())
    assert said == [("user", "Which color?"), ("tool", "blue"), ("assistant", "Blue it is.")]
    assert contents(AgUi(front_end, service, "join", session).finish()) == said
    assert "pick_color" in tools_of(model_server.requests[1])
    repeated = AgUi(front_end, service, "answer", session, json.dumps({"call_1": "red"}), given)
    assert contents(repeated.finish())[:3] == said
    assert "409" in json.dumps(repeated.said)
    assert len(model_server.requests) == 2


def test_the_state_goes_to_the_tools_and_back(
    service: WebService, model_server: ModelServer, front_end: Path, session: str
) -> None:
    model_server.script(call("paint"), say("Done."))
    asking = AgUi(front_end, service, "ask", session, "Paint it", json.dumps({"state": {"color": "green"}}))
    assert contents(asking.finish())[1:] == [("tool", "green"), ("assistant", "Done.")]
    assert asking.state == {"color": "green", "painted": True}


def test_a_front_end_shows_a_run_that_is_taken_over_once_and_keeps_its_tools_and_its_state(
    service: WebService,
    model_server: ModelServer,
    front_end: Path,
    session: str,
    server: EmbeddedServer,
    tmp_path: Path,
    files: dict[str, str],
) -> None:
    given = {"tools": [PICK], "state": {"color": "grey"}}
    asked = {"threadId": session, "runId": "r", "messages": [{"id": "m", "role": "user", "content": "Tell me"}]}
    model_server.script(say("Hello"), say("Hello"))
    steps = (
        (Text("first "), ToolCall("look", ('{"where": "here"}',)), Finish("tool_calls")),
        (Text("half "), Silence(), Finish()),
        call("paint", call_id="call_2"),
        say("The whole answer"),
    )
    with running_service("served", tmp_path, server.url, model_server, files) as dying:
        # The first request of a process imports the model's client, which blocks its event loop.
        for each, thread in ((service, "warm-1"), (dying, "warm-2")):
            each.client.post("/api/ag-ui", json=asked | {"threadId": thread}).raise_for_status()
        model_server.script(*steps)
        with dying.client.stream("POST", "/api/ag-ui", json=asked | given):
            wait_until_sync(lambda: model_server.silent)
            joining = AgUi(front_end, service, "join", session)
            while joining.until("TEXT_MESSAGE_CONTENT")["delta"] != "half ":
                pass
            dying.end(SIGKILL)
    messages = joining.finish()
    said = [("user", "Tell me"), ("assistant", "first "), ("tool", "nothing in here"), ("tool", "grey"),
            ("assistant", "The whole answer")]  # fmt: skip
    assert contents(messages) == said
    assert joining.kinds.count("MESSAGES_SNAPSHOT") == 2
    assert len({message["id"] for message in messages}) == len(messages)
    assert all("pick_color" in tools_of(request) for request in model_server.requests[2:])
    assert contents(AgUi(front_end, service, "join", session).finish()) == said


def test_ag_ui_starts_joins_and_goes_on(
    service: WebService, model_server: ModelServer, front_end: Path, session: str
) -> None:
    model_server.script((Text("half "), Silence(), Text("and half"), Finish()), say("Next."))
    asking = AgUi(front_end, service, "ask", session, "Tell me")
    asking.until("TEXT_MESSAGE_CONTENT")
    joining = AgUi(front_end, service, "join", session)
    joining.until("TEXT_MESSAGE_CONTENT")
    model_server.release()
    expected = [("user", "Tell me"), ("assistant", "half and half")]
    assert contents(asking.finish()) == expected
    assert contents(joining.finish()) == expected
    assert asking.kinds[0] == "RUN_STARTED"
    assert asking.kinds[-1] == "RUN_FINISHED"
    assert joining.kinds[:2] == ["RUN_STARTED", "MESSAGES_SNAPSHOT"]
    assert joining.kinds[-1] == "RUN_FINISHED"

    assert contents(AgUi(front_end, service, "ask", session, "And then?").finish())[-1] == ("assistant", "Next.")
    later = AgUi(front_end, service, "join", session)
    assert contents(later.finish()) == [*expected, ("user", "And then?"), ("assistant", "Next.")]
    assert later.kinds == ["RUN_STARTED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]


def test_ag_ui_gets_tools_and_their_custom_events(
    service: WebService, model_server: ModelServer, front_end: Path, session: str
) -> None:
    model_server.script(call("look", '{"where": ', '"the attic"}'), say("Nothing there."))
    asking = AgUi(front_end, service, "ask", session, "Where is it?")
    messages = asking.finish()
    (tool,) = [message for message in messages if message["role"] == "tool"]
    assert tool["content"] == "nothing in the attic"
    (custom,) = [event for event in asking.said if event.get("type") == "CUSTOM"]
    assert (custom["name"], custom["value"]) == ("agx-info", {"looking": "the attic"})
    calls = [call for message in messages for call in message.get("toolCalls", [])]
    assert [json.loads(one["function"]["arguments"]) for one in calls] == [{"where": "the attic"}]


def test_ag_ui_shows_parallel_sub_agents_two_levels_deep(
    service: WebService, model_server: ModelServer, front_end: Path, session: str
) -> None:
    model_server.script(call("explore", "{}"), say("Done."))
    asking = AgUi(front_end, service, "ask", session, "Explore")
    messages = asking.finish()
    started = {one["subagentRunId"]: one for one in asking.said if one.get("type") == "SUBAGENT_STARTED"}
    texts = {
        run: "".join(
            one["delta"]
            for one in asking.said
            if one.get("type") == "TEXT_MESSAGE_CONTENT" and one.get("subagentRunId") == run
        )
        for run in started
    }
    found = sorted((one["name"], texts[run]) for run, one in started.items())
    assert found == [
        *(("leaf", f"found {place}{n}") for place in "abc" for n in range(3)),
        *(("middle", f"all of {place}") for place in "abc"),
    ]
    assert asking.kinds.count("SUBAGENT_FINISHED") == len(started)
    # The client keeps the messages of sub-agents apart from the run's own.
    own = [message for message in messages if "subagentRunId" not in message]
    assert contents(own)[-1] == ("assistant", "Done.")
    assert {message["subagentRunId"] for message in messages if "subagentRunId" in message} == set(started)


def test_ag_ui_cancels(service: WebService, model_server: ModelServer, front_end: Path, session: str) -> None:
    model_server.script((Text("never "), Silence()))
    asking = AgUi(front_end, service, "ask", session, "Go on")
    asking.until("TEXT_MESSAGE_CONTENT")
    cancelling = AgUi(front_end, service, "cancel", session)
    cancelling.finish()
    assert cancelling.said[0] == {"cancelled": True}
    assert contents(asking.finish())[-1] == ("assistant", "never ")
    assert asking.said[-2]["type"] == "RUN_FINISHED"
    assert asking.said[-2]["outcome"] == {"type": "cancelled"}
    wait_until_sync(lambda: model_server.disconnects == 1, what="the model's connection is closed")


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        ({"approved": True}, "/a deleted"),
        ({"approved": True, "editedArgs": {"path": "/b"}}, "/b deleted"),
        ({"approved": False, "reason": "keep it"}, "keep it"),
    ],
)
def test_ag_ui_waits_for_an_approval(
    service: WebService, model_server: ModelServer, front_end: Path, payload: dict[str, Any], content: str, session: str
) -> None:
    model_server.script(DELETE, say("So be it."))
    asking = AgUi(front_end, service, "ask", session, "Delete /a")
    (interrupt,) = asking.until("RUN_FINISHED")["outcome"]["interrupts"]
    asking.finish()
    joining = AgUi(front_end, service, "join", session)
    assert [one["id"] for one in joining.until("RUN_FINISHED")["outcome"]["interrupts"]] == [interrupt["id"]]
    joining.finish()

    resume = [{"interruptId": interrupt["id"], "status": "resolved", "payload": payload}]
    deciding = AgUi(front_end, service, "decide", session, json.dumps(resume))
    said = contents(deciding.finish())
    assert said == [("user", "Delete /a"), ("assistant", "I will. "), ("tool", content), ("assistant", "So be it.")]
    assert deciding.said[-2]["outcome"] == {"type": "success"}
    assert contents(AgUi(front_end, service, "join", session).finish()) == said

    again = {"threadId": session, "runId": "r", "messages": [], "resume": resume}
    assert service.client.post("/api/ag-ui", json=again).status_code == 409
    assert service.client.post("/api/ag-ui", json=again | {"threadId": "never"}).status_code == 409
    assert len(model_server.requests) == 2


def test_ag_ui_refuses_what_decides_nothing(service: WebService, model_server: ModelServer, session: str) -> None:
    asked = {"threadId": session, "runId": "r", "messages": []}
    for entry in (
        {"interruptId": "int-call_1", "status": "resolved", "payload": {"approved": "yes"}},
        {"interruptId": "unknown", "status": "cancelled"},
    ):
        refused = service.client.post("/api/ag-ui", json=asked | {"resume": [entry]})
        assert refused.status_code == 400, refused.text
    assert not model_server.requests


def test_ag_ui_gets_a_failure(service: WebService, model_server: ModelServer, front_end: Path, session: str) -> None:
    model_server.script((Refusal(400, "no such luck"),))
    asking = AgUi(front_end, service, "ask", session, "Hi")
    asking.finish()
    assert asking.kinds[-1] == "RUN_ERROR"
    assert MODEL_FAILED.sentence in json.dumps(asking.said)
    assert "no such luck" not in json.dumps(asking.said)
