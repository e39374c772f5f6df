"""`make_router()`: starts, follows and cancels runs, and adds the other routes of a page; events in agx's format."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

import asyncio
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Response, status
from pydantic import BaseModel, Field
from pydantic_ai.agent import AbstractAgent

from ..client.files import CLIENT_FILES, ClientFile, read_client_file, tag_file
from ..control.on_busy import OnBusy
from ..jobs.submit import submit
from ..listeners.event_catalogue import event_schema
from ..listeners.manual import is_live
from ..listeners.sse import LiveFrames, event_chunks
from ..sessions.base import SessionStore
from .approvals import add_approvals
from .conversations import add_conversations
from .event_stream import EventStreamResponse
from .history import read_latest_run
from .responses import (
    BAD,
    BUSY,
    COMMON,
    FULL,
    NOTHING,
    OWN_EVENTS,
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
from .turns import ask

_WAIT = 0.5  # seconds for a first event: who has started a run here finds its first one stored
_PAUSE = 0.1  # seconds between two looks whether a worker has begun a run
_MOST = 30.0  # seconds until a request is answered whose run still waits for a worker
_CURSOR = r"^([0-9]{1,19}(-[0-9]{1,19})?)?$"


class Question(BaseModel):
    """A prompt of the user."""

    prompt: str = Field(min_length=1)
    on_busy: OnBusy = Field("reject", description="What to do while the session has a live run")


class StartedRun(BaseModel):
    """A run that was started."""

    session_id: str
    run_id: str
    begun: bool = Field(description="False where it still waits for a worker: its events come later")


@dataclass(frozen=True, slots=True)
class SubmittedRuns:
    """Starts runs of the agent that workers have under a name."""

    agent: str

    async def start(self, who: Who, session_id: str, prompt: str, on_busy: OnBusy) -> tuple[str, bool]:
        """Submit a run; return its id, and whether a worker has begun it within 30 s.

        Until a run has begun, the stream has the run before.

        Raises:
            SessionBusyError: the session has a live run.
            QueueFullError: the scope has as many waiting jobs as it may have.
            RedisUnavailableError: Redis can't be reached.
        """
        run_id = await submit(who.scope_id, who.user_id, session_id, agent=self.agent, prompt=prompt, on_busy=on_busy)
        begun = False
        try:
            async with asyncio.timeout(_MOST):
                while not begun:
                    await asyncio.sleep(_PAUSE)
                    latest = await read_latest_run(who, session_id)
                    begun = latest is not None and latest.run_id == run_id
        except TimeoutError:
            pass  # it is queued, and begins as soon as a worker is free
        return run_id, begun


def make_router(
    agent: AbstractAgent[Any, Any] | str,
    *,
    authorize: Authorize,
    sessions: SessionStore,
    make_deps: MakeDeps = make_plain_deps,
    recipes: Recipes | None = None,
    keep_alive: float = 15,
    max_request: int = 2_097_152,
    retry: float = 1,
    **kwargs: Any,
) -> APIRouter:
    """Return a router for an agent.

    A client that goes away does not cancel its run; only `cancel`, or a shutdown, does.

    Args:
        agent: what runs; or the name of a recipe: the runs are submitted to the workers that have it. With a name,
            `make_deps`, `recipes` and `kwargs` are refused: the recipe has them.
        authorize: a FastAPI dependency that returns `(scope_id, user_id)` of the caller, or raises HTTPException;
            nobody reaches a session of another scope or user.
        sessions: where conversations are kept, `RedisSessions()` or `SqlSessions(engine)`.
        make_deps: makes a run's deps of scope, user and session.
        recipes: by agent name, as a `Worker` takes them; one of them makes `agent`. With recipes, a run whose process
            dies goes on in another process that has the router or a worker. The app must run the router's lifespan,
            as `include_router()` does. None: such a run is lost.
        keep_alive: seconds without an event after which an event stream gets a comment.
        max_request: bytes that the body of a request may have; a larger one is answered with 413.
        retry: seconds that a browser's EventSource waits before it connects again.
        kwargs: reach `agx.run()`, and so `Agent.iter()`.
    """
    who = make_who(authorize)
    router = make_api_router(max_request, COMMON, make_lifespan(recipes))
    runs: Runs | SubmittedRuns
    if isinstance(agent, str):
        if kwargs or recipes is not None or make_deps is not make_plain_deps:
            raise TypeError(
                "with an agent's name, make_deps, recipes and the run's arguments belong in the worker's recipe"
            )
        runs = SubmittedRuns(agent)
    else:
        runs = Runs(agent, sessions, make_deps, kwargs, find_recipe(agent, recipes))
    _add_runs(router, who, runs, keep_alive, int(retry * 1_000))
    add_controls(router, "/sessions/{session_id}", who)
    add_approvals(router, who, runs if isinstance(runs, Runs) else None)
    add_conversations(router, who, sessions)
    for name in CLIENT_FILES:
        _add_file(router, name, read_client_file(name))
    schema = json.dumps(event_schema()).encode()
    _add_file(router, "events.schema.json", tag_file(schema, "application/schema+json"))
    return router


def _add_runs(router: APIRouter, who: GetWho, runs: Runs | SubmittedRuns, keep_alive: float, retry_ms: int) -> None:
    Asker = Annotated[Who, Depends(who)]
    retry = b"retry: %d\n\n" % retry_ms

    @router.post(
        "/sessions/{session_id}/runs",
        status_code=status.HTTP_202_ACCEPTED,
        response_model=StartedRun,
        responses={**OWN_EVENTS, **BAD, **BUSY, **FULL},
    )
    async def start_run(
        session_id: SessionId, question: Question, asker: Asker, accept: Annotated[str, Header()] = ""
    ) -> StartedRun | Response:
        """Start a run, or do with a live one what `on_busy` names; follow its events.

        With `Accept: text/event-stream` the answer is the event stream itself, which saves a round trip. A run that
        still waits for a worker is answered as without it.
        """
        begun = True
        if isinstance(runs, SubmittedRuns):
            run_id, begun = await runs.start(asker, session_id, question.prompt, question.on_busy)
        else:
            run_id = await runs.start(asker, session_id, ask(question.prompt), question.on_busy)
        if begun and EventStreamResponse.media_type in accept:
            live = LiveFrames()
            chunks = event_chunks(asker.scope_id, asker.user_id, session_id, "", wait=_WAIT, live=live)
            return EventStreamResponse(chunks, keep_alive=keep_alive, first=retry, live=live)
        return StartedRun(session_id=session_id, run_id=run_id, begun=begun)

    @router.get("/sessions/{session_id}/events", response_class=Response, responses={**OWN_EVENTS, **NOTHING})
    async def follow_events(
        session_id: SessionId,
        asker: Asker,
        last_event_id: Annotated[str, Header(pattern=_CURSOR)] = "",
        follow: Annotated[Literal["run", "session"], Query()] = "run",
    ) -> Response:
        """Stream the latest run's events, from its first or after `Last-Event-ID`, up to its `end`.

        With `follow=session` the stream stays open, also where there is no run yet: the session's next runs follow.
        """
        whole = follow == "session"
        whose = (asker.scope_id, asker.user_id, session_id)
        live = LiveFrames()
        chunks = event_chunks(*whose, last_event_id, wait=_WAIT, whole_session=whole, live=live)
        first = b""
        # A live run is silent at times: only where there is none one has to look whether anything is to come.
        if not whole and not await is_live(*whose):
            first = await anext(chunks, b"")
            if not first:
                return Response(status_code=status.HTTP_204_NO_CONTENT)
        return EventStreamResponse(chunks, keep_alive=keep_alive, first=retry + first, live=live)


def _add_file(router: APIRouter, name: str, file: ClientFile) -> None:
    # Without `authorize`: a page's `import` can't send a token.
    @router.get(f"/{name}", include_in_schema=False)
    async def read_file(if_none_match: Annotated[str, Header()] = "") -> Response:
        # A page that has been open for days asks again after an upgrade of the service.
        headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
        if file.etag in if_none_match:
            return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)
