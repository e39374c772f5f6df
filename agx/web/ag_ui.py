"""`make_ag_ui_router()`: front ends that speak AG-UI, which start, join and stop runs."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from itertools import takewhile
from typing import Annotated, Any

from ag_ui.core import (
    BaseEvent,
    CustomEvent,
    MessagesSnapshotEvent,
    ResumeEntry,
    RunAgentInput,
    ToolCallResultEvent,
    ToolMessage,
    UserMessage,
)
from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import ToolFailed
from pydantic_ai.messages import ModelMessage
from pydantic_ai.tools import DeferredToolResults
from pydantic_ai.ui.ag_ui import AGUIAdapter

from ..listeners.replay import replay
from ..listeners.replayed_run import Event, defer
from ..listeners.void import ResumeEvent
from ..sessions.base import SessionStore
from ..sessions.lost_answer import add_event
from .event_stream import EventStreamResponse
from .history import read_conversation
from .responses import (
    BAD,
    CHANGED,
    COMMON,
    EVENTS,
    FULL,
    ID_PATTERN,
    Authorize,
    add_controls,
    make_who,
)
from .route import make_api_router
from .runs import (
    MakeDeps,
    Recipes,
    Runs,
    Who,
    find_recipe,
    make_lifespan,
    make_plain_deps,
)
from .sub_agents.ag_ui import ThreadEventStream
from .turns import (
    Prompt,
    Turn,
    ask,
    decide,
    external_calls,
    pending_calls,
    prompt_of,
    refusing_unreadable,
)

_USER_MESSAGE: JsonDict = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "role": {"const": "user"},
        "content": {"type": "string", "minLength": 1},
    },
    "required": ["id", "role", "content"],
}


class FrontEndTool(BaseModel):
    """A tool of the front end."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict, description="JSON Schema of an object")


class RunInput(BaseModel):
    """AG-UI's RunAgentInput. The server keeps the conversation: of the messages only the end is read."""

    model_config = ConfigDict(alias_generator=to_camel, extra="allow")

    thread_id: str = Field(pattern=ID_PATTERN, description="The session")
    run_id: str = Field(description="The client's id of this request, which it gets back")
    messages: list[dict[str, Any]] = Field(
        default_factory=list,
        description="AG-UI's messages; the last one is the user's, or the last ones are results of external tool calls",
        json_schema_extra={"items": {"anyOf": [_USER_MESSAGE, {"type": "object"}]}},
    )
    resume: list[ResumeEntry] | None = Field(
        None, description="Decisions on the calls that interrupted the last run, instead of a message"
    )
    protocol_version: str | None = Field(None, description="The client's AG-UI version")
    tools: list[FrontEndTool] = Field(default_factory=list, description="What the agent may call in the front end")
    state: Any = Field(None, description="An object, for deps that have a `state`")
    forwarded_props: Any = Field(None, description="`onBusy`: what to do while the thread has a live run")

    @property
    def on_busy(self) -> Any:
        """What to do while the thread has a live run; not checked."""
        return self.forwarded_props.get("onBusy", "reject") if isinstance(self.forwarded_props, dict) else "reject"

    @property
    def front_end(self) -> dict[str, Any] | None:
        """The tools and the state, if there are any; a state that is no object counts as none."""
        state = self.state if isinstance(self.state, dict) else {}
        tools = [tool.model_dump() for tool in self.tools]
        return {"tools": tools, "state": state} if tools or state else None

    @property
    def for_adapter(self) -> RunAgentInput:
        """What pydantic-ai's adapter takes; with nothing in it that the server keeps itself."""
        known = self.model_dump(by_alias=True, include={"thread_id", "run_id", "resume", "protocol_version"})
        nothing: dict[str, Any] = {"messages": [], "tools": [], "context": [], "state": {}, "forwardedProps": {}}
        return RunAgentInput.model_validate({**known, **nothing})


def make_ag_ui_router(
    agent: AbstractAgent[Any, Any],
    *,
    authorize: Authorize,
    sessions: SessionStore,
    make_deps: MakeDeps = make_plain_deps,
    recipes: Recipes | None = None,
    keep_alive: float = 15,
    max_request: int = 16_777_216,
    **kwargs: Any,
) -> APIRouter:
    """Return a router for AG-UI clients; its prefix is the `url` of an `HttpAgent`, and `{url}/connect` joins a thread.

    A client that goes away, or calls `abortRun()`, does not cancel its run: `POST {url}/{thread}/cancel` does.
    The agent may call the front end's tools, and its state is set on deps that have a `state`. A call that is made
    elsewhere (a tool of the front end, `CallDeferred`, an external tool) stays open: the front end runs again with its
    result, a tool message, at the end.

    Args:
        agent: what runs.
        authorize: a FastAPI dependency that returns `(scope_id, user_id)` of the caller, or raises HTTPException.
        sessions: where conversations are kept.
        make_deps: makes a run's deps of scope, user and session.
        recipes: by agent name, as a `Worker` takes them; one of them makes `agent`. With recipes, a run whose process
            dies goes on in another process that has the router or a worker. The app must run the router's lifespan,
            as `include_router()` does. None: such a run is lost.
        keep_alive: seconds without an event after which an event stream gets a comment.
        max_request: bytes that the body of a request may have; a larger one is answered with 413.
        kwargs: reach `agx.run()`, and so `Agent.iter()`.
    """
    who = make_who(authorize)
    runs = Runs(agent, sessions, make_deps, kwargs, find_recipe(agent, recipes))
    router = make_api_router(max_request, COMMON, make_lifespan(recipes))
    add_controls(router, "/{session_id}", who)
    Asker = Annotated[Who, Depends(who)]

    @router.post("", response_class=Response, responses={**EVENTS, **BAD, **CHANGED, **FULL})
    async def run_agent(request: RunInput, asker: Asker) -> Response:
        """Start a run with the last message, or with decisions on or results of calls, and stream its events."""
        turn = _read_turn(agent, request)
        await runs.start(asker, request.thread_id, turn, request.on_busy, request.front_end)
        return respond(asker, request, _follow(asker, request))

    @router.post("/connect", response_class=Response, responses={**EVENTS, **BAD})
    async def connect(request: RunInput, asker: Asker) -> Response:
        """Join a thread: its messages, then the events of the run that is live, if one is, from its beginning."""
        found = await read_conversation(sessions, asker, request.thread_id)
        messages = found.session.msgs
        events = _follow(asker, request) if found.live else _left(messages)
        return respond(asker, request, events, messages)

    def respond(
        asker: Who, request: RunInput, events: AsyncGenerator[Event, None], snapshot: list[ModelMessage] | None = None
    ) -> Response:
        async def read_asked() -> list[ModelMessage]:
            return (await read_conversation(sessions, asker, request.thread_id)).asked

        return EventStreamResponse(_frames(request, events, snapshot, read_asked), keep_alive=keep_alive)

    return router


def _read_turn(agent: AbstractAgent[Any, Any], request: RunInput) -> Turn:
    with refusing_unreadable():
        results = AGUIAdapter(agent=agent, run_input=request.for_adapter).deferred_tool_results
        outputs = _read_outputs(request.messages)
        if results is not None or outputs:
            return decide(results or DeferredToolResults(), outputs)
        if not request.messages or request.messages[-1].get("role") != "user":
            raise ValueError("it must be the user's")
        return ask(_read_content(UserMessage.model_validate(request.messages[-1])))


def _read_outputs(messages: list[dict[str, Any]]) -> dict[str, object]:
    """Return the results of tool calls that stand after the last message of another kind, by call."""
    outputs: dict[str, object] = {}
    for message in takewhile(lambda message: message.get("role") == "tool", reversed(messages)):
        result = ToolMessage.model_validate(message)
        output: object = result.content
        if result.error is not None:
            output = ToolFailed(result.error)
        elif not isinstance(result.content, str):
            output = _read_content(UserMessage(id=result.id, content=result.content))
        outputs[result.tool_call_id] = output
    return outputs


def _read_content(message: UserMessage) -> Prompt:
    return prompt_of(AGUIAdapter.load_messages([message]))


def _follow(asker: Who, request: RunInput) -> AsyncGenerator[Event, None]:
    return replay(asker.scope_id, asker.user_id, request.thread_id)


async def _left(messages: list[ModelMessage]) -> AsyncGenerator[Event, None]:
    pending, external = pending_calls(messages), external_calls(messages)
    if pending:
        approvals = [call for call_id, call in pending.items() if call_id not in external]
        yield defer(approvals=approvals, calls=[pending[call_id] for call_id in pending if call_id in external])


async def _frames(
    request: RunInput,
    events: AsyncGenerator[Event, None],
    snapshot: list[ModelMessage] | None,
    read_asked: Callable[[], Awaitable[list[ModelMessage]]],
) -> AsyncGenerator[str, None]:
    stream = ThreadEventStream(run_input=request.for_adapter)
    given: list[ModelMessage] = []  # by this run
    parts: list[Any] = []  # of the response that is open

    async def noted() -> AsyncGenerator[Event, None]:
        async for event in events:
            add_event(event, given, parts)
            yield event

    async def transformed() -> AsyncGenerator[BaseEvent, None]:
        missing = snapshot
        # The results that the front end has sent with this request are among its messages.
        known = set(_read_outputs(request.messages)) if snapshot is None else set()
        async for event in stream.transform_stream(noted()):
            if isinstance(event, ToolCallResultEvent) and event.tool_call_id in known:
                continue
            yield event
            if isinstance(event, CustomEvent) and event.name == ResumeEvent.name:
                # The front end has a part of an answer that is void: it gets its messages without that.
                stream.new_message_id()
                asked = await read_asked()
                missing = [*asked, *given] if asked else None
            if missing is not None:
                # After RUN_STARTED, which is always first.
                yield MessagesSnapshotEvent(messages=AGUIAdapter.dump_messages(missing))
                missing = None

    async with aclosing(events):
        async for frame in stream.encode_stream(transformed()):
            yield frame
