"""A chat service: runs that survive the request, events as SSE that resume, cancel, a tool, sessions in SQLite.

pip install 'opale-agent-stream' 'pydantic-ai-slim[openai]' fastapi uvicorn
OPENAI_API_KEY=... AGX_REDIS_URL=redis://localhost:6379 python examples/fastapi_sse.py

curl -N localhost:8000/chat/first -H 'content-type: application/json' -d '{"prompt": "What time is it in Lisbon?"}'
curl -N localhost:8000/chat/first/events                            # from the beginning, from any process
curl -N localhost:8000/chat/first/events -H 'Last-Event-ID: ID'     # after an event; 204 when there is no more
curl -X POST localhost:8000/chat/first/cancel
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated
from zoneinfo import ZoneInfo

import uvicorn
from fastapi import FastAPI, Header, HTTPException, Path, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry
from redis.asyncio import Redis

import agx

REDIS_URL = os.environ.get("AGX_REDIS_URL", "redis://localhost:6379")
DATABASE = os.environ.get("DATABASE", "chats.sqlite")
GRACE = float(os.environ.get("GRACE", "10"))  # seconds that a shutdown gives to live runs
MODEL = os.environ.get("MODEL", "openai:gpt-4o-mini")

# A real service takes both from whom it has authenticated, never from the request's path or body.
SCOPE, USER = "acme", "ada"

log = logging.getLogger("chat")


@dataclass
class ChatDeps(agx.Deps):
    """What agx needs to know of a run; tools get it as `ctx.deps`."""

    def get_scope_id(self) -> str:
        return SCOPE


@dataclass
class SqliteSession(agx.Session):
    """A conversation, kept in one row. SQLite blocks, so it works in a thread."""

    id: str

    async def load(self) -> None:
        if row := await asyncio.to_thread(self._select):
            self.msgs_from_json(row[0])

    async def save(self) -> None:
        await asyncio.to_thread(self._upsert, self.msgs_to_json())

    def _select(self) -> tuple[bytes] | None:
        with closing(sqlite3.connect(DATABASE)) as database:
            found: tuple[bytes] | None = database.execute(
                "select messages from chats where scope = ? and owner = ? and id = ?", (SCOPE, USER, self.id)
            ).fetchone()
            return found

    def _upsert(self, messages: bytes) -> None:
        with closing(sqlite3.connect(DATABASE)) as database, database:
            database.execute("insert or replace into chats values (?, ?, ?, ?)", (SCOPE, USER, self.id, messages))


agent = Agent(
    MODEL,
    deps_type=ChatDeps,
    name="clock",
    instructions="You answer briefly. Ask the tool for the time, never guess it.",
    defer_model_check=True,  # the key is needed by the first run, not by the import
)


@agent.tool_plain
async def current_time(timezone: str) -> str:
    """Return the time in a time zone of the IANA database, such as Europe/Lisbon."""
    try:
        return datetime.now(ZoneInfo(timezone)).isoformat(timespec="minutes")
    except (KeyError, ValueError):
        raise ModelRetry(f"{timezone!r} is no IANA time zone") from None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with closing(sqlite3.connect(DATABASE)) as database, database:
        database.execute(
            "create table if not exists chats (scope, owner, id, messages, primary key (scope, owner, id))"
        )
    async with Redis.from_url(REDIS_URL) as redis:
        agx.configure(agx.Config(redis=redis, service_name="chat"))
        yield
        # Then they are cancelled (reason `shutdown`), and their sessions saved.
        await agx.aclose(grace=GRACE)


app = FastAPI(title="Chat", lifespan=lifespan)


class Question(BaseModel):
    prompt: str


SessionId = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$")]


@app.post("/chat/{session_id}")
async def chat(session_id: SessionId, question: Question) -> Response:
    """Start a run in the background and stream its events. Going away does not cancel it."""
    deps = ChatDeps(user_id=USER, session_id=session_id)
    running = asyncio.create_task(agx.run(SqliteSession(session_id), agent, question.prompt, deps))
    running.add_done_callback(report)
    answer = asyncio.create_task(stream(agx.sse(SCOPE, USER, session_id)))
    await asyncio.wait({running, answer}, return_when=asyncio.FIRST_COMPLETED)
    if running.done() and isinstance(error := running.exception(), agx.SessionBusyError | agx.RedisUnavailableError):
        answer.cancel()
        raise HTTPException(409 if isinstance(error, agx.SessionBusyError) else 503, str(error))
    return await answer


@app.get("/chat/{session_id}/events")
async def events(session_id: SessionId, last_event_id: Annotated[str | None, Header()] = None) -> Response:
    """Stream a run's events, after the last one that the client has seen: a browser's EventSource says which."""
    return await stream(agx.sse(SCOPE, USER, session_id, last_event_id=last_event_id))


@app.post("/chat/{session_id}/cancel")
async def cancel(session_id: SessionId) -> dict[str, bool]:
    """Cancel the session's run, wherever it runs; false if there is none."""
    return {"cancelled": await agx.cancel(SCOPE, USER, session_id)}


async def stream(frames: AsyncGenerator[str, None]) -> Response:
    """Answer with SSE, or with 204 where nothing is to come, which stops a browser's EventSource from asking again."""
    try:
        first = await anext(frames, None)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None  # a Last-Event-ID that none can be
    if first is None:
        return Response(status_code=204)

    async def all_frames() -> AsyncGenerator[str, None]:
        yield first
        async for frame in frames:
            yield frame

    return StreamingResponse(all_frames(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def report(running: asyncio.Task[object]) -> None:
    """Log how a run ended, if not well: nobody awaits its task."""
    if not running.cancelled() and (error := running.exception()) is not None:
        log.log(logging.INFO if isinstance(error, agx.AgxCanceledError) else logging.ERROR, "%s", error)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    # Open event streams must not hold up a shutdown: clients resume at the next process.
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), timeout_graceful_shutdown=1)
