"""The routes of a router for calls that wait: list them, and decide on them."""

# No `from __future__ import annotations`: FastAPI evaluates annotations, and some name what a function was given.

from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, status
from pydantic import BaseModel, Field
from pydantic_ai.tools import DeferredToolResults

from ..checkpoints.codec import load_results
from ..control.approvals import Decision, PendingCall
from ..engine.registry import current_engine
from ..jobs.decide import go_on, pending, record_decision
from ..redis.keys import SessionKeys
from ..runs.deferred import results_of
from .responses import CHANGED, ID_PATTERN, NOT_LIVE, GetWho, SessionId
from .runs import Runs, Who
from .turns import decide as decide_turn


class WaitingCall(BaseModel):
    """A tool call that waits for a decision, or for its result."""

    session_id: str
    run_id: str
    call_id: str
    tool: str
    args: dict[str, Any]
    kind: Literal["approval", "result"]
    since: datetime
    expires: datetime | None


class WaitingCalls(BaseModel):
    """The user's calls that wait, the oldest first."""

    calls: list[WaitingCall]


class DecisionBody(BaseModel):
    """A decision on a call."""

    call_id: str = Field(min_length=1)
    approve: bool
    args: dict[str, Any] | None = Field(None, description="Take the place of the model's")
    result: Any = Field(None, description="Of a call that is made elsewhere")
    key: str | None = Field(None, pattern=ID_PATTERN, description="Makes a repeat harmless")


class Decided(BaseModel):
    """The decision is stored."""

    run_id: str | None = Field(description="The run that goes on; null while other calls of the session wait")


def add_approvals(router: APIRouter, who: GetWho, runs: Runs | None) -> None:
    """Add the routes; `runs` goes on with the service's own runs, None where workers do."""
    Asker = Annotated[Who, Depends(who)]

    @router.get("/approvals")
    async def list_calls(asker: Asker) -> WaitingCalls:
        """List the user's tool calls that wait."""
        return WaitingCalls(calls=[_show(call) for call in await pending(asker.scope_id, asker.user_id)])

    @router.post(
        "/sessions/{session_id}/decisions",
        status_code=status.HTTP_202_ACCEPTED,
        responses={**NOT_LIVE, **CHANGED},
    )
    async def decide_on_call(session_id: SessionId, body: DecisionBody, asker: Asker) -> Decided:
        """Decide on a tool call; with the last decision, the run goes on."""
        engine = current_engine()
        session = SessionKeys.of(engine.config.key_prefix, asker.scope_id, asker.user_id, session_id)
        decision = Decision(**body.model_dump(exclude={"call_id"}), by=str(asker.user_id))
        calls = await record_decision(engine, session, body.call_id, decision)
        if not calls:
            return Decided(run_id=None)
        return Decided(run_id=await (_go_on_here(runs, asker, calls) if runs is not None else go_on(engine, calls)))


def _go_on_here(runs: Runs, asker: Who, calls: list[PendingCall]) -> Awaitable[str]:
    results: DeferredToolResults = load_results(results_of(calls))
    return runs.start(asker, calls[0].session_id, decide_turn(results, results.calls))


def _show(call: PendingCall) -> WaitingCall:
    fields = {name: getattr(call, name) for name in ("session_id", "run_id", "call_id", "tool", "args", "kind")}
    expires = None if call.expires_ms is None else datetime.fromtimestamp(call.expires_ms / 1_000, UTC)
    return WaitingCall(**fields, since=datetime.fromtimestamp(call.since_ms / 1_000, UTC), expires=expires)
