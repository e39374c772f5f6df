"""One attempt to drive an agent: loads the session, runs the agent, saves the session, and ends the run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from pydantic_ai import CallToolsNode, ModelRequestNode, UserPromptNode
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, UserPromptPart
from pydantic_ai.run import AgentRun, AgentRunResult
from pydantic_ai.tools import DeferredToolRequests
from pydantic_ai.usage import RunUsage
from pydantic_graph import End
from redis.exceptions import RedisError

from ..checkpoints.codec import UnreadableCheckpointError, load_results
from ..checkpoints.job import Job
from ..checkpoints.journal import Journal
from ..checkpoints.progress import Progress, fingerprint, fold
from ..error_codes import RUN_LOST, SESSION_NOT_SAVED
from ..errors import (
    AgxCanceledError,
    AgxError,
    LeaseLostError,
    RedisUnavailableError,
    RunHandedOverError,
    SessionConflictError,
    SessionSaveError,
)
from ..model_calls.private_api import restore_pending, take_snapshot
from ..recovery.dead_run import DeadRun
from ..redis.bus import CONNECTION_ERRORS
from ..redis.keys import SessionKeys
from ..sessions.base import Session, keep_prompt, mark_external
from ..telemetry.tracing import Attached
from .capability import AgxCapability
from .deferred import forget_calls, list_calls
from .deps import Deps
from .driving_task import DrivingTask, run_to_end
from .lifecycle import RunLifecycle
from .outcome import CancelSource, Ending, classify
from .state import RunState

logger = logging.getLogger("agx")


@dataclass(slots=True)
class Drive:
    """One attempt to drive an agent: its messages, and how it ended.

    Args:
        dead: the run that this attempt goes on with; None for a run's first attempt.
        job: how another process can go on with the run; None where none can.
    """

    life: RunLifecycle
    session: Session
    dead: DeadRun | None = None
    job: Job | None = None
    task: DrivingTask = field(default_factory=DrivingTask)
    loaded: bool = False
    result: AgentRunResult[Any] | None = None
    request: ModelRequest | None = None  # with the prompt
    ending: Ending = field(default_factory=lambda: Ending("completed"))
    raised: BaseException | None = None
    save_error: BaseException | None = None
    _handing_over: bool = False
    _handed_over: bool = False
    _stored: int = 0  # messages of the conversation before the run's own

    # Its callers do not share a coroutine around it: each one is gone through five times a token.
    @property
    def resumable(self) -> bool:
        return self.job is not None

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Keep what `run_agent()` raises; `end()` raises it, in the run's trace context as the agent."""
        if self.resumable:
            self.life.on_shutdown = lambda: self.hand_over(now=True)
        with Attached(self.life.recorder.span.context):
            try:
                yield
            except BaseException as error:
                self._note_error(error)

    async def end(self) -> AgentRunResult[Any]:
        """Save the session and end the run; returns the agent's result, or raises as `agx.run()` does."""
        with Attached(self.life.recorder.span.context):
            await run_to_end(self._conclude())
        return self._outcome()

    async def run_agent(self, agent: AbstractAgent[Any, Any], prompt: Any, deps: Deps, kwargs: dict[str, Any]) -> None:
        """Load the conversation, store the prompt, and run the agent to its end, from where the last attempt got."""
        await self.session.load()
        if (history := kwargs.get("message_history")) is not None:
            self.session.msgs = list(history)
        progress = self._restore(prompt)
        self._stored = progress.stored
        if self.request is None and not progress.begun and prompt is not None:
            self.request = ModelRequest(parts=[UserPromptPart(prompt)])
            await self.session.begin(self.request)
        steered = self.life.recorder.steered
        steered.restore(progress.messages, (message for one in progress.pending for message in one.messages))
        self.loaded = True
        if self.dead is None:
            await forget_calls(self.life.engine, self.life.recorder, self.session.msgs)
        if self._state.must_stop:
            raise RunCancelled("the run was cancelled before its agent began")
        capability = AgxCapability(_recorder=self.life.recorder)
        kwargs = {**kwargs, "capabilities": [*(kwargs.get("capabilities") or ()), capability]}
        kwargs["message_history"] = list(progress.messages)
        if "conversation" not in kwargs:  # which names one itself, and allows no second
            kwargs.setdefault("conversation_id", self.life.recorder.span.conversation_id)
        if progress.usage is not None:
            kwargs["usage"] = _restore_usage(kwargs.get("usage"), progress.usage)
        if progress.begun:
            prompt = None
            kwargs.pop("deferred_tool_results", None)
        elif self.job is not None and self.job.results is not None:
            kwargs.setdefault("deferred_tool_results", load_results(self.job.results))
        agent_run: AgentRun[Any, Any] | None = None
        try:
            async with agent.iter(prompt, deps=deps, **kwargs) as agent_run:
                if self.resumable:
                    self._keep_journal(agent_run, progress)
                # As `agent.run()` does, and not `async for`: one coroutine less for each token to go through.
                node = agent_run.next_node
                if progress.ends_with_answer:
                    # pydantic-ai would ask the model again, where the agent has instructions.
                    await agent_run.next(cast("UserPromptNode[Any, Any]", node))
                    node = CallToolsNode(cast("ModelResponse", progress.messages[-1]))
                while not isinstance(node, End) and agent_run.result is None:
                    node = await agent_run.next(node)
                    if isinstance(node, ModelRequestNode) and self.request is not None and self.request.run_id is None:
                        self.request = replace(node.request, run_id=agent_run.run_id)
            self.result = agent_run.result
        finally:
            if agent_run is not None:
                # A cancelled or failed run keeps what it completed, the partial answer included.
                self.session.msgs = agent_run.all_messages()

    # --- runs that another process can go on with ---

    def _restore(self, prompt: Any) -> Progress:
        """Return how far the run got in earlier attempts.

        Raises:
            UnreadableCheckpointError: nobody can go on with the run.
        """
        if self.dead is None:
            return Progress(len(self.session.msgs), self.session.msgs)
        progress = fold(self.dead.checkpoints, self.session.msgs, self.dead.job.goes_on_from)
        if (before := self.life.before) is not None:
            if before.was_asking:
                # The request is sent again: then its instructions are known.
                self.life.recorder.on_request = before.queue_facts
            else:
                before.queue_facts()
        if progress.begun:
            own = progress.messages[progress.stored]
            self.request = own if isinstance(own, ModelRequest) and prompt is not None else None
        elif prompt is not None and is_prompt(progress.messages[-1:], prompt):
            # Stored before the agent began.
            self.request = cast("ModelRequest", progress.messages.pop())
            progress.stored -= 1
        return progress

    def _keep_journal(self, agent_run: AgentRun[Any, Any], progress: Progress) -> None:
        state = agent_run.ctx.state
        state.output_retries_used = progress.output_retries
        open_calls = {call.tool_call_id for call in progress.open_calls}  # enqueue again, if they run again
        restore_pending(agent_run, (one for one in progress.pending if one.tool_call_id not in open_calls))
        journal = Journal(progress, lambda: take_snapshot(agent_run))
        journal.hand_over = self._handing_over
        self.life.recorder.journal = journal

    def hand_over(self, *, now: bool) -> None:
        """Have another process go on with the run: at the next model request, or at once."""
        self._handing_over = True
        recorder = self.life.recorder
        if recorder.journal is not None:
            recorder.journal.hand_over = True
        if now and recorder.stop is not None:
            recorder.stop()

    # --- the end ---

    def _note_error(self, error: BaseException) -> None:
        """Take what the agent, or `session.load()`, raised."""
        self.raised = error
        if self._handing_over and self._state.cancel_reason is None and not self._state.fenced:
            self._handed_over = isinstance(error, (RunHandedOverError, RunCancelled))
        if self.resumable and not self.loaded and _is_outage(error):
            self._handed_over = True  # nothing has run yet: the next attempt loads the session once Redis answers
        if isinstance(error, UnreadableCheckpointError):
            logger.error("agx: run %s can't be resumed and is lost: %s", self.life.recorder.run_id, error)
            self.ending = Ending("lost", error=error, seen_as=RUN_LOST)
            return
        self.ending = classify(error, self._state, CancelSource(task=self.task.is_cancelled))

    async def _conclude(self) -> None:
        """Save, then end; nothing interrupts it. Whatever saving raises, the run is ended."""
        if self._handed_over:
            await self.life.hand_over()
            return
        steered = self.life.recorder.steered
        try:
            if self.request is not None and self.loaded:
                self.session.msgs = keep_prompt(self.session.msgs, self.request)
            if self.result is not None and isinstance(self.result.output, DeferredToolRequests):
                self.session.msgs = mark_external(self.session.msgs, self.result.output.calls)
            if self.loaded and await self._may_save():
                self.session.msgs = [*self.session.msgs, *steered.leave()]
                if self.result is not None and isinstance(self.result.output, DeferredToolRequests):
                    await list_calls(self.life.engine, self.life.recorder, self.result.output, self.job)
                await self._save()
                await steered.remove()
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
        if self.resumable and not self._state.confirmed:
            await self.life.check_lease()  # this process has stalled, so another one may have resumed the run
        if not self._state.fenced:
            return True
        if self.resumable:
            return False  # the process that resumed it has saved, or will
        try:
            await self.life.take_lease_again()
        except (AgxError, RedisError, OSError):
            return False
        return True

    async def _save(self) -> None:
        """Save the session. What a stalled attempt of the same run has saved is replaced."""
        try:
            await self.session.save()
        except SessionConflictError:
            ours = self.session.msgs
            if self.dead is None or not await self._is_saved_by_another_attempt(ours):
                raise
            self.session.msgs = ours
            await self.session.save()

    async def _is_saved_by_another_attempt(self, ours: list[ModelMessage]) -> bool:
        await self.session.load()
        theirs, first = self.session.msgs, self._stored
        if len(theirs) <= first or fingerprint(theirs[:first]) != fingerprint(ours[:first]):
            return False
        run_id = theirs[first].run_id  # the first attempt gives it, and the others have it from a checkpoint
        return run_id is not None and run_id in {message.run_id for message in ours[first:]}

    def _outcome(self) -> AgentRunResult[Any]:
        """Return the result or raise what the caller has to know."""
        raised = self.raised
        messages = self.session.msgs
        if isinstance(raised, asyncio.CancelledError):
            raise raised
        if self._handed_over:
            raise RunHandedOverError
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


def _restore_usage(given: RunUsage | None, recorded: RunUsage) -> RunUsage:
    """Return a caller's usage with what the attempts before have recorded, in place: the caller reads it afterwards.

    What it had when the run began is in the recorded usage.
    """
    if given is None:
        return recorded
    for each in fields(recorded):
        setattr(given, each.name, getattr(recorded, each.name))
    return given


def _is_outage(error: BaseException) -> bool:
    return isinstance(error, RedisUnavailableError) and isinstance(error.__cause__, CONNECTION_ERRORS)


def is_prompt(messages: Sequence[ModelMessage], prompt: Any) -> bool:
    """Return whether a message is a prompt as `Session.begin()` stores it."""
    last = messages[-1] if messages else None
    if not isinstance(last, ModelRequest) or last.run_id is not None or len(last.parts) != 1:
        return False
    part = last.parts[0]
    return isinstance(part, UserPromptPart) and part.content == prompt
