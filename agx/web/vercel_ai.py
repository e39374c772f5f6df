"""`make_vercel_ai_router()`: chat pages with the AI SDK's `useChat`, which resume and stop a run on the server."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response, status
from pydantic import BaseModel, Field
from pydantic.config import JsonDict
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import ToolFailed
from pydantic_ai.messages import ModelMessage
from pydantic_ai.tools import DeferredToolResults
from pydantic_ai.ui.vercel_ai import VercelAIAdapter
from pydantic_ai.ui.vercel_ai.request_types import (
    DynamicToolApprovalRequestedPart,
    DynamicToolInputAvailablePart,
    DynamicToolOutputAvailablePart,
    DynamicToolOutputErrorPart,
    SubmitMessage,
    ToolApprovalRequestedPart,
    ToolInputAvailablePart,
    ToolOutputAvailablePart,
    ToolOutputErrorPart,
    UIMessage,
    UIMessagePart,
)
from pydantic_ai.ui.vercel_ai.response_types import AbortChunk, ErrorChunk, FinishChunk, MessageMetadataChunk

from ..control.on_busy import OnBusy
from ..listeners.replay import replay, replay_messages
from ..listeners.replayed_run import Event
from ..sessions.base import SessionStore
from ..stream.events import to_readable
from .event_stream import EventStreamResponse
from .history import read_conversation
from .responses import (
    BAD,
    CHANGED,
    COMMON,
    EVENTS,
    FULL,
    ID_PATTERN,
    NOTHING,
    Authorize,
    GetWho,
    SessionId,
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
from .sub_agents.vercel_ai import ChatEventStream
from .turns import (
    Turn,
    ask,
    ask_again,
    decide,
    end_of_prompt,
    external_calls,
    prompt_of,
    refusing_unreadable,
    text_of,
)

SdkVersion = Literal[5, 6, 7]

logger = logging.getLogger("agx")

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


# Of the caller, the session, the message that the answer goes on in, and the messages that it begins with.
StreamRun = Callable[[Who, str, str | None, list[ModelMessage]], Response]

_VALUES = frozenset({"input", "raw_input", "output"})  # of a tool's part: any JSON


class ChatRequest(BaseModel, extra="allow"):
    """What the AI SDK's transport sends. The server keeps the conversation: only the last message is read."""

    id: str = Field(pattern=ID_PATTERN, description="The chat: the session")
    trigger: Literal["submit-message", "regenerate-message"] = Field(
        "submit-message", description="Whether the last message is answered, or answered once more"
    )
    on_busy: OnBusy = Field("reject", alias="onBusy", description="What to do while the chat has a live run")
    messages: list[dict[str, Any]] = Field(
        min_length=1,
        description="UIMessages; the last one is the user's, or the assistant's with decisions on its tool calls",
        json_schema_extra={"items": {"anyOf": [_USER_MESSAGE, {"type": "object"}]}},
    )


class ChatHistory(BaseModel):
    """A conversation for `useChat({messages, resume: live})`."""

    messages: list[UIMessage] = Field(description="A prompt that is being answered is last")
    run_id: str | None = Field(description="The latest run, as long as its events are kept")
    live: bool = Field(description="Whether that run is live: resume its stream")
    outcome: str | None = Field(
        description="How that run ended: completed, cancelled, failed, or lost, where its process died"
    )


def make_vercel_ai_router(
    agent: AbstractAgent[Any, Any],
    *,
    authorize: Authorize,
    sessions: SessionStore,
    make_deps: MakeDeps = make_plain_deps,
    recipes: Recipes | None = None,
    sdk_version: SdkVersion = 7,
    keep_alive: float = 15,
    max_request: int = 16_777_216,
    **kwargs: Any,
) -> APIRouter:
    """Return a router for the AI SDK; give its prefix to `DefaultChatTransport` as `api`.

    A client that goes away, or calls `stop()`, does not cancel its run: `POST {api}/{id}/cancel` does.

    Args:
        agent: what runs.
        authorize: a FastAPI dependency that returns `(scope_id, user_id)` of the caller, or raises HTTPException.
        sessions: where conversations are kept.
        make_deps: makes a run's deps of scope, user and session.
        recipes: by agent name, as a `Worker` takes them; one of them makes `agent`. With recipes, a run whose process
            dies goes on in another process that has the router or a worker. The app must run the router's lifespan,
            as `include_router()` does. None: such a run is lost.
        sdk_version: major version of the npm package `ai` in the page.
        keep_alive: seconds without an event after which an event stream gets a comment.
        max_request: bytes that the body of a request may have; a larger one is answered with 413.
        kwargs: reach `agx.run()`, and so `Agent.iter()`.
    """
    who = make_who(authorize)
    runs = Runs(agent, sessions, make_deps, kwargs, find_recipe(agent, recipes))
    router = make_api_router(max_request, COMMON, make_lifespan(recipes))
    add_controls(router, "/{session_id}", who)
    Asker = Annotated[Who, Depends(who)]

    def stream_run(asker: Who, session_id: str, message_id: str | None, opening: list[ModelMessage]) -> Response:
        stream = ChatEventStream(sdk_version=sdk_version, server_message_id=message_id)
        ended = partial(_describe_end, sessions, asker, session_id)
        frames = _frames(stream, _replay_answer(asker, session_id, opening), ended)
        return EventStreamResponse(frames, keep_alive=keep_alive, headers=stream.response_headers)

    @router.post("", response_class=Response, responses={**EVENTS, **BAD, **CHANGED, **FULL})
    async def send_message(request: ChatRequest, asker: Asker) -> Response:
        """Start a run with the last message, and stream its answer.

        That is an answer to the user's message, or with `regenerate-message` another one in place of the last. Where
        the last message is the assistant's, with decisions on its tool calls, it is the rest of its answer.
        """
        again = request.trigger == "regenerate-message"
        lost = (await read_conversation(sessions, asker, request.id)).lost if again else None
        turn = _read_turn(agent, request, sdk_version, lost)
        run_id = await runs.start(asker, request.id, turn, request.on_busy)
        # The rest of an answer has no id of its own: it goes on in the message that the page has.
        return stream_run(asker, request.id, None if turn.results else run_id, [])

    _add_reads(router, who, sessions, sdk_version, stream_run)
    return router


def _add_reads(
    router: APIRouter, who: GetWho, sessions: SessionStore, sdk_version: SdkVersion, stream_run: StreamRun
) -> None:
    Asker = Annotated[Who, Depends(who)]

    @router.get("/{session_id}/stream", response_class=Response, responses={**EVENTS, **NOTHING})
    async def resume_stream(session_id: SessionId, asker: Asker, run: str = "") -> Response:
        """Stream the answer that is being given, from its beginning; 204 where there is none.

        With `run`, also one that has ended since the page read of it in the conversation.
        """
        found = await read_conversation(sessions, asker, session_id)
        if found.run_id is None or not (found.live or found.run_id == run):
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        # The message's id is the run's: a page that resumes replaces its copy.
        return stream_run(asker, session_id, found.run_id, found.opening)

    @router.get("/{session_id}")
    async def read_history(session_id: SessionId, asker: Asker) -> ChatHistory:
        """Return the conversation as UIMessages."""
        found = await read_conversation(sessions, asker, session_id)
        messages = found.described_messages()
        if found.live and found.opening:
            # Whoever resumes gets the answer from its beginning.
            messages = messages[: end_of_prompt(messages)]
        return ChatHistory(
            messages=_dump(messages, sdk_version), run_id=found.run_id, live=found.live, outcome=found.outcome
        )


def _read_turn(agent: AbstractAgent[Any, Any], request: ChatRequest, sdk_version: SdkVersion, lost: str | None) -> Turn:
    again = request.trigger == "regenerate-message"
    with refusing_unreadable():
        message = UIMessage.model_validate(request.messages[-1])
        if message.role == "assistant" and not again:
            submitted = SubmitMessage(id=request.id, messages=[message])
            adapter = VercelAIAdapter(agent=agent, run_input=submitted, sdk_version=sdk_version)
            results, outputs = adapter.deferred_tool_results, _read_outputs(message)
            if results is None and not outputs:
                raise ValueError("it is the assistant's, and decides on no tool call")
            return decide(results or DeferredToolResults(), outputs)
        if message.role != "user":
            raise ValueError("it must be the user's")
        prompt = prompt_of(VercelAIAdapter.load_messages([message]))
    # There is nothing to drop where the run was lost.
    return ask_again(prompt) if again and text_of(prompt) != lost else ask(prompt)


def _read_outputs(message: UIMessage) -> dict[str, object]:
    """Return the results that a page has given to tool calls (`addToolOutput`), and those it got from here."""
    outputs: dict[str, object] = {}
    for part in message.parts:
        if isinstance(part, ToolOutputAvailablePart | DynamicToolOutputAvailablePart) and not part.preliminary:
            outputs[part.tool_call_id] = part.output
        elif isinstance(part, ToolOutputErrorPart | DynamicToolOutputErrorPart):
            outputs[part.tool_call_id] = ToolFailed(part.error_text)
    return outputs


async def _frames(
    stream: ChatEventStream,
    events: AsyncGenerator[Event, None],
    describe_end: Callable[[], Awaitable[MessageMetadataChunk | None]],
) -> AsyncGenerator[str, None]:
    """Yield the frames of an answer; before it ends, its message gets what `describe_end` returns."""
    is_ended = False
    async with aclosing(events):
        async for chunk in stream.transform_stream(events):
            if isinstance(chunk, FinishChunk | AbortChunk | ErrorChunk) and not is_ended:
                is_ended = True
                if (metadata := await describe_end()) is not None:
                    yield stream.encode_event(metadata)
            yield stream.encode_event(chunk)


async def _describe_end(sessions: SessionStore, asker: Who, session_id: str) -> MessageMetadataChunk | None:
    """Return the metadata that a reload would show too: by now the conversation is stored."""
    try:
        found = await read_conversation(sessions, asker, session_id)
    except Exception:
        # The answer itself is complete: the page gets it without its tokens and cost.
        logger.warning("the end of an answer in %s can't be described", session_id, exc_info=True)
        return None
    return MessageMetadataChunk(message_metadata={"agx": found.describe_last_answer()})


async def _replay_answer(asker: Who, session_id: str, opening: list[ModelMessage]) -> AsyncGenerator[Event, None]:
    for opening_event in replay_messages(opening):
        yield opening_event
    async with aclosing(replay(asker.scope_id, asker.user_id, session_id)) as events:
        async for event in events:
            yield event


def _dump(messages: list[ModelMessage], sdk_version: SdkVersion) -> list[UIMessage]:
    """Return UIMessages as a page has them that saw the answers come: one message for each, however many steps."""
    external = external_calls(messages)
    dumped: list[UIMessage] = []
    for message in VercelAIAdapter.dump_messages(messages, sdk_version=sdk_version):
        message.parts = [_await_result(part) if _asks_approval(part, external) else part for part in message.parts]
        for part in message.parts:
            for name in _VALUES & part.__class__.model_fields.keys():
                setattr(part, name, to_readable(getattr(part, name)))
        if dumped and message.role == dumped[-1].role == "assistant":
            dumped[-1].parts.extend(message.parts)
        else:
            dumped.append(message)
    return dumped


def _asks_approval(part: UIMessagePart, calls: Collection[str]) -> bool:
    return isinstance(part, ToolApprovalRequestedPart | DynamicToolApprovalRequestedPart) and part.tool_call_id in calls


def _await_result(part: UIMessagePart) -> UIMessagePart:
    """Return the part of an external call as it was before the page was loaded again: it awaits a result."""
    fields = part.model_dump(exclude={"approval", "state"})
    dynamic = isinstance(part, DynamicToolApprovalRequestedPart)
    return (DynamicToolInputAvailablePart if dynamic else ToolInputAvailablePart).model_validate(fields)
