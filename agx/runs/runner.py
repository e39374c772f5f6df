"""`run()`: drives an agent, streams it, and saves its session on every outcome."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic_ai import ModelRequestNode
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import ModelRequest, UserContent, UserPromptPart
from pydantic_ai.run import AgentRun, AgentRunResult
from pydantic_graph import End
from redis.exceptions import RedisError

from ..engine.leases import Lease
from ..engine.registry import current_engine
from ..errors import (
    SESSION_NOT_SAVED,
    AgxCanceledError,
    AgxError,
    LeaseLostError,
    SessionSaveError,
)
from ..redis.keys import SessionKeys
from ..sessions.base import Session, keep_prompt
from ..stream.events import Runtime
from ..telemetry.tracing import attached
from .capability import AgxCapability
from .deps import Deps
from .driving_task import DrivingTask, run_to_end
from .lifecycle import RunLifecycle
from .opening import open_streamed
from .outcome import CancelSource, Ending, classify
from .state import RunState

logger = logging.getLogger("agx")

DepsT = TypeVar("DepsT", bound=Deps)
OutputT = TypeVar("OutputT")

# An event loop keeps only weak references to tasks: a bare `create_task(run(...))` would be collected.
_tasks: set[asyncio.Task[Any]] = set()


async def run(
    session: Session,
    agent: AbstractAgent[DepsT, OutputT],
    user_prompt: str | Sequence[UserContent] | None,
    deps: DepsT,
    **kwargs: Any,
) -> AgentRunResult[OutputT]:
    """Run an agent: every event goes to the session's stream, facts to operators, and the session is saved.

    Wraps `Agent.iter()`, and returns what `agent.run()` would.

    Args:
        session: the conversation; loaded before, saved after, on every outcome. What is saved is what pydantic-ai's
            `all_messages()` gives, so a history processor's changes stay; the prompt is always in it.
        agent: any of pydantic-ai's agents.
        user_prompt: any prompt that pydantic-ai takes.
        deps: the agent's dependencies; they say whose run it is.
        kwargs: reach `Agent.iter()`, for example `model` or `usage_limits`. A `message_history` takes the place of the
            loaded conversation, and is saved in its place.

    Raises:
        AgxCanceledError: the run was cancelled; `.messages` holds the partial conversation.
        SessionBusyError: the session has a live run.
        RedisUnavailableError: Redis could not be reached within 2 s at the start; nothing was run.
        SessionSaveError: `session.save()` failed; `.result` and `.messages` hold what it should have kept.
        LeaseLostError: another run took the session over while this process was stalled.
        asyncio.CancelledError: the task was cancelled from outside.
        Exception: whatever the agent, its tools or `session.load()` raised.
    """
    engine = current_engine()
    keys = SessionKeys.of(engine.config.key_prefix, deps.get_scope_id(), deps.user_id, deps.session_id)
    task = asyncio.current_task()
    assert task is not None
    _tasks.add(task)
    try:
        deps.runtime = Runtime()
        life = await open_streamed(engine, agent.name or "agent", keys, runtime=deps.runtime, follows=deps.follows)
        drive = _Drive(life, session)
        with attached(life.recorder.span.context):
            try:
                await drive.run_agent(agent, user_prompt, deps, kwargs)
            except BaseException as error:
                drive.note_error(error)
            await run_to_end(drive.conclude())
        return drive.outcome()
    finally:
        _tasks.discard(task)


@dataclass(slots=True)
class _Drive:
    """One drive of an agent: its messages, and how it ended."""

    life: RunLifecycle
    session: Session
    task: DrivingTask = field(default_factory=DrivingTask)
    loaded: bool = False
    result: AgentRunResult[Any] | None = None
    request: ModelRequest | None = None  # with the prompt
    ending: Ending = field(default_factory=lambda: Ending("completed"))
    raised: BaseException | None = None
    save_error: BaseException | None = None

    async def run_agent(self, agent: AbstractAgent[Any, Any], prompt: Any, deps: Deps, kwargs: dict[str, Any]) -> None:
        await self.session.load()
        if (history := kwargs.get("message_history")) is not None:
            self.session.msgs = list(history)
        if prompt is not None:
            self.request = ModelRequest(parts=[UserPromptPart(prompt)])
            await self.session.begin(self.request)
        self.loaded = True
        if self._state.must_stop:
            raise RunCancelled("the run was cancelled before its agent began")
        capability = AgxCapability(_recorder=self.life.recorder)
        kwargs = {**kwargs, "capabilities": [*(kwargs.get("capabilities") or ()), capability]}
        kwargs["message_history"] = list(self.session.msgs)
        if "conversation" not in kwargs:  # which names one itself, and allows no second
            kwargs.setdefault("conversation_id", self.life.recorder.span.conversation_id)
        agent_run: AgentRun[Any, Any] | None = None
        try:
            async with agent.iter(prompt, deps=deps, **kwargs) as agent_run:
                # As `agent.run()` does, and not `async for`: one coroutine less for each token to go through.
                node = agent_run.next_node
                while not isinstance(node, End) and agent_run.result is None:
                    node = await agent_run.next(node)
                    if isinstance(node, ModelRequestNode) and self.request is not None and self.request.run_id is None:
                        self.request = replace(node.request, run_id=agent_run.run_id)
            self.result = agent_run.result
        finally:
            if agent_run is not None:
                # A cancelled or failed run keeps what it completed, the partial answer included.
                self.session.msgs = agent_run.all_messages()

    def note_error(self, error: BaseException) -> None:
        """Take what the agent, or `session.load()`, raised."""
        self.raised = error
        self.ending = classify(error, self._state, CancelSource(task=self.task.is_cancelled))

    async def conclude(self) -> None:
        """Save, then end; nothing interrupts it. Whatever saving raises, the run is ended."""
        try:
            if self.request is not None and self.loaded:
                self.session.msgs = keep_prompt(self.session.msgs, self.request)
            if self.loaded and await self._may_save():
                await self.session.save()
        except (Exception, asyncio.CancelledError) as error:
            # Nobody cancels this task, so a CancelledError comes from what `save()` awaits.
            self.save_error = error
            if self.ending.outcome == "completed":
                self.ending = Ending("failed", error=error, seen_as=SESSION_NOT_SAVED)
            else:
                logger.error("agx: session %s was not saved", self._keys.session, exc_info=error)
        finally:
            await self.life.close(self.ending)

    @property
    def _keys(self) -> SessionKeys:
        keys = self.life.recorder.session
        assert keys is not None
        return keys

    @property
    def _state(self) -> RunState:
        return self.life.recorder.state

    async def _may_save(self) -> bool:
        """A fenced run saves only if nobody else holds the session: it must not overwrite a newer conversation."""
        if not self._state.fenced:
            return True
        # Under the run's own id: `close()` gives it up.
        lease = Lease(self._keys, self.life.recorder.run_id, lambda reason, mark_ms: None, lambda: None)
        try:
            await self.life.engine.leases.acquire(lease)
        except (AgxError, RedisError, OSError):
            return False
        return True

    def outcome(self) -> AgentRunResult[Any]:
        """Return the result or raise what the caller has to know."""
        raised = self.raised
        messages = self.session.msgs
        if isinstance(raised, asyncio.CancelledError):
            raise raised
        if self._state.fenced:
            raise LeaseLostError(messages) from raised
        if self.ending.outcome == "cancelled":
            raise AgxCanceledError(messages, reason=self.ending.reason or "cancel") from raised
        if raised is not None:
            raise raised
        if self.save_error is not None:
            raise SessionSaveError(self.save_error, messages, self.result) from self.save_error
        assert self.result is not None
        return self.result
