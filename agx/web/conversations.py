"""Adds the routes for stored conversations: list and search, read, rename, branch, delete."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

import json
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, status
from pydantic import BaseModel, Field

from ..errors import SessionUnknownError
from ..jobs.deletion import delete_session
from ..listeners.manual import q
from ..sessions.base import TITLE_LENGTH, SessionStore, branch_session
from ..stream.events import to_readable
from .history import count_stored, read_conversation
from .responses import BUSY, CHANGED, ID_PATTERN, STORED, GetWho, SessionId
from .runs import Who


class StoredConversation(BaseModel):
    """A stored conversation."""

    session_id: str
    title: str = Field(description="The one it was given, or the first prompt")
    saved_at: datetime
    live: bool = Field(description="Whether it has a live run")
    parent: str | None = Field(description="The session that it branches from")


class Conversations(BaseModel):
    """A page of the user's stored conversations, the last saved first."""

    conversations: list[StoredConversation]


class LiveSessions(BaseModel):
    """The sessions of the user that have a live run."""

    sessions: list[str]


class Messages(BaseModel):
    """A conversation, and what is being answered in it."""

    messages: list[dict[str, Any]] = Field(
        description="pydantic-ai's messages; a prompt that is being answered is last"
    )
    run_id: str | None = Field(description="The latest run, as long as its events are kept")
    live: bool = Field(description="Whether that run is live: follow its events")
    outcome: str | None = Field(
        description="How that run ended: completed, cancelled, failed, or lost, where its process died"
    )
    last_event_id: str | None = Field(description="The latest event of that run; after it is what comes next")


class Title(BaseModel):
    """A title that later turns do not change."""

    title: str = Field(min_length=1, max_length=TITLE_LENGTH, pattern=r"[^\s\x00-\x1f]")


class BranchPoint(BaseModel):
    """Where a new conversation begins to differ."""

    messages: int = Field(ge=1, description="How many of the messages that `GET .../messages` shows it has")
    branch_id: str | None = Field(None, pattern=ID_PATTERN, description="The new session; by default a random one")


class Branch(BaseModel):
    """A new conversation."""

    session_id: str


def add_conversations(router: APIRouter, who: GetWho, sessions: SessionStore) -> None:
    """Add the routes."""
    Asker = Annotated[Who, Depends(who)]

    @router.get("/sessions")
    async def list_conversations(
        asker: Asker,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        search: Annotated[str, Query(max_length=TITLE_LENGTH, description="A text in the title or the messages")] = "",
        parent: Annotated[
            str | None, Query(pattern=ID_PATTERN, description="Only the branches of this session")
        ] = None,
    ) -> Conversations:
        """List the user's stored conversations. `RedisSessions` searches only their titles."""
        scope, user = asker.scope_id, asker.user_id
        found = await sessions.list(scope, user, limit=limit, offset=offset, search=search, parent=parent)
        live = {session async for _, _, session in q(scope, user)}
        return Conversations(
            conversations=[
                StoredConversation(
                    session_id=one.session_id,
                    title=one.title,
                    saved_at=one.saved_at,
                    live=one.session_id in live,
                    parent=one.parent,
                )
                for one in found
            ]
        )

    @router.get("/live")
    async def list_live_sessions(asker: Asker) -> LiveSessions:
        """List the user's sessions that have a live run."""
        return LiveSessions(sessions=[session async for _, _, session in q(asker.scope_id, asker.user_id)])

    @router.get("/sessions/{session_id}/messages")
    async def read_messages(session_id: SessionId, asker: Asker) -> Messages:
        """Return the conversation."""
        found = await read_conversation(sessions, asker, session_id)
        return Messages(
            messages=to_readable(json.loads(found.session.msgs_to_json())),
            run_id=found.run_id,
            live=found.live,
            outcome=found.outcome,
            last_event_id=None if found.latest is None else found.latest.last_event_id,
        )

    @router.put("/sessions/{session_id}/title", status_code=status.HTTP_204_NO_CONTENT, responses=STORED)
    async def rename_conversation(session_id: SessionId, title: Title, asker: Asker) -> None:
        """Give the conversation a title."""
        await sessions.rename(asker.scope_id, asker.user_id, session_id, title.title)

    @router.delete("/sessions/{session_id}", status_code=status.HTTP_204_NO_CONTENT, responses={**STORED, **BUSY})
    async def delete_conversation(session_id: SessionId, asker: Asker) -> None:
        """Cancel the session's run, then remove the conversation and all that is kept of the session."""
        if not await delete_session(asker.scope_id, asker.user_id, session_id, sessions=sessions):
            raise SessionUnknownError(session_id)

    @router.post(
        "/sessions/{session_id}/branches",
        status_code=status.HTTP_201_CREATED,
        responses={**STORED, **CHANGED},
    )
    async def branch_conversation(session_id: SessionId, point: BranchPoint, asker: Asker) -> Branch:
        """Store the first messages of the conversation as a new, independent one."""
        session = sessions.open(asker.scope_id, asker.user_id, session_id)
        await session.load()
        branch = await branch_session(
            asker.scope_id,
            asker.user_id,
            session_id,
            messages=count_stored(session.msgs, point.messages),
            sessions=sessions,
            branch_id=point.branch_id,
        )
        return Branch(session_id=branch)
