"""`make_vercel_ai_router()`: chat pages with the AI SDK's `useChat`, which resume and stop a run on the server."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Response, status
from pydantic import BaseModel, Field
from pydantic.config import JsonDict
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.ui.vercel_ai import VercelAIAdapter, VercelAIEventStream
from pydantic_ai.ui.vercel_ai.request_types import UIMessage

from ..listener import follow
from ..replay import replay_entries
from ..session import SessionStore
from .answers import (
    BAD,
    BUSY,
    COMMON,
    EVENTS,
    ID_PATTERN,
    NOTHING,
    Authorize,
    SessionId,
    add_cancel,
    answering_errors,
    make_who,
    stream_events,
)
from .history import read_conversation, read_latest_run
from .prompt import prompt_of
from .runs import MakeDeps, Runs, Who, make_plain_deps

_USER_MESSAGE: JsonDict = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "role": {"const": "user"},
        "parts": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string", "minLength": 1}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["id", "role", "parts"],
    "additionalProperties": False,
}


class ChatRequest(BaseModel, extra="allow"):
    """What the AI SDK's transport sends. The server keeps the conversation: only the last message is read."""

    id: str = Field(pattern=ID_PATTERN, description="The chat: the session")
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    messages: list[dict[str, Any]] = Field(
        min_length=1,
        description="UIMessages; the last one is the user's",
        json_schema_extra={"items": {"anyOf": [_USER_MESSAGE, {"type": "object"}]}},
    )


class ChatHistory(BaseModel):
    """A conversation for `useChat({messages, resume: live})`."""

    messages: list[UIMessage] = Field(description="A prompt that is being answered is last")
    run_id: str | None = Field(description="The latest run, as long as its events are kept")
    live: bool = Field(description="Whether that run is live: resume its stream")


def make_vercel_ai_router(
    agent: AbstractAgent[Any, Any],
    *,
    authorize: Authorize,
    sessions: SessionStore,
    make_deps: MakeDeps = make_plain_deps,
    sdk_version: Literal[5, 6, 7] = 6,
    keep_alive: float = 15,
    **kwargs: Any,
) -> APIRouter:
    """Return a router for the AI SDK; give its prefix to `DefaultChatTransport` as `api`.

    A client that goes away, or calls `stop()`, does not cancel its run: `POST {api}/{id}/cancel` does.

    Args:
        agent: what runs.
        authorize: a FastAPI dependency that returns `(scope_id, user_id)` of whoever asks, or raises HTTPException.
        sessions: where conversations are kept.
        make_deps: makes a run's deps of scope, user and session.
        sdk_version: major version of the npm package `ai` in the page.
        keep_alive: seconds of silence after which an event stream gets a comment.
        kwargs: reach `agx.run()`, and so `Agent.iter()`.
    """
    who = make_who(authorize)
    runs = Runs(agent, sessions, make_deps, kwargs)
    router = APIRouter(responses=COMMON)
    add_cancel(router, "/{session_id}/cancel", who)
    Asker = Annotated[Who, Depends(who)]

    def stream_run(asker: Who, session_id: str, run_id: str) -> Response:
        # The message's id is the run's: whoever resumes replaces what it had of it.
        stream: VercelAIEventStream[Any, Any] = VercelAIEventStream(sdk_version=sdk_version, server_message_id=run_id)

        async def frames() -> AsyncGenerator[str, None]:
            entries = follow(asker.scope_id, asker.user_id, session_id, wait=3, timeout=None, after=None)
            async with aclosing(entries):
                async for frame in stream.encode_stream(stream.transform_stream(replay_entries(entries))):
                    yield frame

        return stream_events(frames(), keep_alive=keep_alive, headers=stream.response_headers)

    @router.post("", response_class=Response, responses={**EVENTS, **BAD, **BUSY})
    async def send_message(request: ChatRequest, asker: Asker) -> Response:
        """Start a run with the last message, and stream its answer."""
        if request.trigger != "submit-message":
            raise HTTPException(400, "the server keeps the conversation: a message can't be regenerated")
        prompt = prompt_of(lambda: _load(request.messages[-1]))
        with answering_errors():
            run_id = await runs.start(asker, request.id, prompt)
        return stream_run(asker, request.id, run_id)

    @router.get("/{session_id}/stream", response_class=Response, responses={**EVENTS, **NOTHING})
    async def resume_stream(session_id: SessionId, asker: Asker, run: str = "") -> Response:
        """Stream the answer that is being given, from its beginning; 204 where there is none.

        With `run`, also one that has ended since the page read of it in the conversation.
        """
        with answering_errors():
            latest = await read_latest_run(asker, session_id)
        if latest is None or not (latest.live or latest.run_id == run):
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        return stream_run(asker, session_id, latest.run_id)

    @router.get("/{session_id}")
    async def read_history(session_id: SessionId, asker: Asker) -> ChatHistory:
        """Return the conversation as UIMessages."""
        with answering_errors():
            found = await read_conversation(sessions, asker, session_id)
        messages = VercelAIAdapter.dump_messages(found.session.msgs, sdk_version=sdk_version)
        return ChatHistory(messages=messages, run_id=found.run_id, live=found.live)

    return router


def _load(message: dict[str, Any]) -> list[ModelMessage]:
    if message.get("role") != "user":
        raise ValueError("the last message must be the user's")
    return VercelAIAdapter.load_messages([UIMessage.model_validate(message)])
