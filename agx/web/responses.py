"""What all routers share: the caller's ids, errors as HTTP answers, what the OpenAPI has of them."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, status
from pydantic import BaseModel, Field

from ..control.cancellation import cancel
from ..control.feedback import MAX_COMMENT, MAX_NAME, MAX_VALUE, feedback
from ..control.inbox import MAX_TEXT
from ..control.steering import steer
from ..error_codes import NOT_FOUND
from ..listeners.event_catalogue import event_schema
from ..redis import keys
from .route import Problem, RefusedError
from .runs import Who

ID_PATTERN = f"^{keys.ID.pattern}$"
SessionId = Annotated[str, Path(pattern=ID_PATTERN, description="The session: one conversation of one user")]
Authorize = Callable[..., Any]  # a FastAPI dependency that returns (scope_id, user_id), or raises HTTPException

GetWho = Callable[..., Awaitable[Who]]  # the dependency of the routes

Responses = dict[int | str, dict[str, Any]]


class Cancelled(BaseModel):
    """Whether there was a live run to cancel; it ends a moment later."""

    cancelled: bool


def make_who(authorize: Authorize) -> GetWho:
    """Return the dependency that gives every route the ids that `authorize` returned."""
    if not callable(authorize):
        raise TypeError("authorize must be a FastAPI dependency that returns (scope_id, user_id)")

    async def who(ids: Annotated[Any, Depends(authorize)]) -> Who:
        scope_id, user_id = ids
        keys.check_id(scope_id, "scope_id")
        keys.check_id(user_id, "user_id")
        return Who(scope_id, user_id)

    return who


COMMON: Responses = {
    400: {"model": Problem, "description": "The page's `agx.js` is too old: load the page again"},
    401: {"model": Problem, "description": "Not authenticated"},
    403: {"model": Problem, "description": "Not allowed"},
    422: {"model": Problem, "description": "The request can't be read"},
    503: {"model": Problem, "description": "Redis can't be reached"},
}
BUSY: Responses = {409: {"model": Problem, "description": "The session has a live run: follow it, or cancel it first"}}
NOT_LIVE: Responses = {404: {"model": Problem, "description": "The session has no live run"}}
UNKNOWN: Responses = {404: {"model": Problem, "description": "The session has no such run, or it has not ended"}}
STORED: Responses = {404: {"model": Problem, "description": "The user has no such conversation"}}
FULL: Responses = {429: {"model": Problem, "description": "Too much is waiting"}}
CHANGED: Responses = {
    409: {"model": Problem, "description": "The session has a live run, or its conversation is not the one shown"}
}
BAD: Responses = {
    400: {"model": Problem, "description": "The last message can't be read"},
    413: {"model": Problem, "description": "The body is too large"},
}


def _describe_stream(data: dict[str, Any]) -> Responses:
    """Return the answer of a route that streams: OpenAPI 3.1 has no word for it, so the schema is of one event."""
    schema = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "data": {"type": "string", "contentMediaType": "application/json"} | data,
        },
        "required": ["data"],
    }
    return {200: {"description": "Server-sent events", "content": {"text/event-stream": {"schema": schema}}}}


EVENTS = _describe_stream({})  # of a front end's protocol
OWN_EVENTS = _describe_stream({"contentSchema": event_schema()})
NOTHING: Responses = {204: {"description": "Nothing is to come: do not ask again"}}


class Message(BaseModel):
    """What the user adds while a run is live."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    key: str | None = Field(None, pattern=ID_PATTERN, description="A second message with this key is not added")


class Steered(BaseModel):
    """The message is in the run's next model request, or at the end of its conversation."""

    steered: Literal[True] = True


class Score(BaseModel):
    """What the user thinks of a run."""

    run_id: str = Field(pattern=ID_PATTERN)
    name: str = Field("thumb", pattern=ID_PATTERN, max_length=MAX_NAME, description="What is scored")
    value: float = Field(ge=0, le=MAX_VALUE, allow_inf_nan=False, description="A thumb is 1 or 0")
    comment: str | None = Field(None, max_length=MAX_COMMENT)
    key: str | None = Field(None, pattern=ID_PATTERN, description="A second score with this key is not counted")


class Scored(BaseModel):
    """The score is recorded."""

    recorded: Literal[True] = True


def add_controls(router: APIRouter, path: str, who: GetWho) -> None:
    """Add the routes that stop, steer and score a run: in every protocol, none of which has a word for them."""

    @router.post(f"{path}/steer", status_code=status.HTTP_202_ACCEPTED, responses={**NOT_LIVE, **FULL})
    async def steer_run(session_id: SessionId, message: Message, asker: Annotated[Who, Depends(who)]) -> Steered:
        """Give the session's live run a message, in whatever process it runs."""
        if not await steer(asker.scope_id, asker.user_id, session_id, message.text, key=message.key):
            raise RefusedError(NOT_FOUND)
        return Steered()

    @router.post(f"{path}/cancel")
    async def cancel_run(session_id: SessionId, asker: Annotated[Who, Depends(who)]) -> Cancelled:
        """Cancel the session's run, in whatever process it runs."""
        return Cancelled(cancelled=await cancel(asker.scope_id, asker.user_id, session_id))

    @router.post(f"{path}/feedback", responses=UNKNOWN)
    async def score_run(session_id: SessionId, score: Score, asker: Annotated[Who, Depends(who)]) -> Scored:
        """Record what the user thinks of a run of the session that has ended."""
        given = score.model_dump()
        await feedback(asker.scope_id, asker.user_id, session_id, by=str(asker.user_id), **given)
        return Scored()
