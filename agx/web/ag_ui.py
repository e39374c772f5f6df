"""`make_ag_ui_router()`: front ends that speak AG-UI, which start, join and stop runs."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from ag_ui.core import BaseEvent, MessagesSnapshotEvent, UserMessage
from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.ui.ag_ui import AGUIAdapter, AGUIEventStream

from ..hub import StreamEntry
from ..listener import follow
from ..replay import replay_entries
from ..session import SessionStore
from .answers import (
    BAD,
    BUSY,
    COMMON,
    EVENTS,
    ID_PATTERN,
    Authorize,
    add_cancel,
    answering_errors,
    make_who,
    stream_events,
)
from .history import read_conversation
from .prompt import prompt_of
from .runs import MakeDeps, Runs, Who, make_plain_deps

_USER_MESSAGE: JsonDict = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "role": {"const": "user"},
        "content": {"type": "string", "minLength": 1},
    },
    "required": ["id", "role", "content"],
}


class RunInput(BaseModel):
    """AG-UI's RunAgentInput. The server keeps the conversation: of the messages only the last is read."""

    model_config = ConfigDict(alias_generator=to_camel, extra="allow")

    thread_id: str = Field(pattern=ID_PATTERN, description="The session")
    run_id: str = Field(description="The client's id of this request, which it gets back")
    messages: list[dict[str, Any]] = Field(
        default_factory=list,
        description="AG-UI's messages; to start a run, the last one is the user's",
        json_schema_extra={"items": {"anyOf": [_USER_MESSAGE, {"type": "object"}]}},
    )


def make_ag_ui_router(
    agent: AbstractAgent[Any, Any],
    *,
    authorize: Authorize,
    sessions: SessionStore,
    make_deps: MakeDeps = make_plain_deps,
    keep_alive: float = 15,
    **kwargs: Any,
) -> APIRouter:
    """Return a router for AG-UI clients; its prefix is the `url` of an `HttpAgent`, and `{url}/connect` joins a thread.

    A client that goes away, or calls `abortRun()`, does not cancel its run: `POST {url}/{thread}/cancel` does.
    Tools and state of the front end are not passed on to the agent.

    Args:
        agent: what runs.
        authorize: a FastAPI dependency that returns `(scope_id, user_id)` of whoever asks, or raises HTTPException.
        sessions: where conversations are kept.
        make_deps: makes a run's deps of scope, user and session.
        keep_alive: seconds of silence after which an event stream gets a comment.
        kwargs: reach `agx.run()`, and so `Agent.iter()`.
    """
    who = make_who(authorize)
    runs = Runs(agent, sessions, make_deps, kwargs)
    router = APIRouter(responses=COMMON)
    add_cancel(router, "/{session_id}/cancel", who)
    Asker = Annotated[Who, Depends(who)]

    @router.post("", response_class=Response, responses={**EVENTS, **BAD, **BUSY})
    async def run_agent(request: RunInput, asker: Asker) -> Response:
        """Start a run with the last message, and stream its events."""
        prompt = prompt_of(lambda: _load(request.messages))
        with answering_errors():
            await runs.start(asker, request.thread_id, prompt)
        return stream_events(_frames(request, _entries(asker, request), None), keep_alive=keep_alive)

    @router.post("/connect", response_class=Response, responses={**EVENTS, **BAD})
    async def connect(request: RunInput, asker: Asker) -> Response:
        """Join a thread: its messages, then the events of the run that is live, if one is, from its beginning."""
        with answering_errors():
            found = await read_conversation(sessions, asker, request.thread_id)
        entries = _entries(asker, request) if found.live else _no_entries()
        return stream_events(_frames(request, entries, found.session.msgs), keep_alive=keep_alive)

    return router


def _load(messages: list[dict[str, Any]]) -> list[ModelMessage]:
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message must be the user's")
    return AGUIAdapter.load_messages([UserMessage.model_validate(messages[-1])])


def _entries(asker: Who, request: RunInput) -> AsyncGenerator[StreamEntry, None]:
    return follow(asker.scope_id, asker.user_id, request.thread_id, wait=3, timeout=None, after=None)


async def _no_entries() -> AsyncGenerator[StreamEntry, None]:
    return
    yield


async def _frames(
    request: RunInput, entries: AsyncGenerator[StreamEntry, None], snapshot: list[ModelMessage] | None
) -> AsyncGenerator[str, None]:
    stream: AGUIEventStream[Any, Any] = AGUIEventStream(thread_id=request.thread_id, run_id=request.run_id)

    async def events() -> AsyncGenerator[BaseEvent, None]:
        missing = snapshot
        async for event in stream.transform_stream(replay_entries(entries)):
            yield event
            if missing is not None:
                # Behind RUN_STARTED, which is always first.
                yield MessagesSnapshotEvent(messages=AGUIAdapter.dump_messages(missing))
                missing = None

    async with aclosing(entries):
        async for frame in stream.encode_stream(events()):
            yield frame
