"""The capability: pydantic-ai's hooks become calls of the recorder, however the agent is driven."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

from opentelemetry.trace import NoOpTracer
from pydantic_ai import CallToolsNode, ModelRequestNode, RunContext, UserPromptNode, capture_run_messages
from pydantic_ai.capabilities import AbstractCapability, CombinedCapability, Instrumentation
from pydantic_ai.capabilities.abstract import (
    AgentNode,
    CapabilityOrdering,
    NodeResult,
    ValidatedToolArgs,
    WrapModelRequestHandler,
    WrapRunHandler,
    WrapToolExecuteHandler,
)
from pydantic_ai.exceptions import (
    ApprovalRequired,
    CallDeferred,
    ModelRetry,
    SkipToolExecution,
    ToolFailed,
    ToolRetryError,
)
from pydantic_ai.messages import AgentStreamEvent, ModelResponse, ToolCallPart
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import ToolDefinition
from pydantic_graph import End

from ..checkpoints.replayed import replay_return
from ..engine.registry import current_engine
from ..errors import RunHandedOverError
from ..facts.schema import NodeKind
from ..model_calls.private_api import cancel_was_requested, run_timed_out
from ..model_calls.streaming import find_obstacle, report_obstacle
from ..redis.keys import Id, SessionKeys
from ..telemetry.tracing import Attached, captures_content, has_no_sdk
from .deps import Deps
from .driving_task import DrivingTask
from .lifecycle import RunLifecycle, enclosing_recorder, working_in
from .observed_stream import ObservedStream
from .opening import open_observed, open_streamed
from .outcome import CancelSource, Ending, classify
from .recording.recorder import Recorder

# The model reads it.
_INTERRUPTED = (
    "This call was interrupted: its process stopped while it may have been under way. It may have taken effect. "
    "Check before you call it again."
)
_ID = "agx"  # fixed: of two instances without one both would fire and everything would double

_NODE_KINDS: dict[type, NodeKind] = {
    UserPromptNode: "user_prompt",
    ModelRequestNode: "model_request",
    CallToolsNode: "call_tools",
}

# Whether the node that begins is to be streamed. pydantic-ai asks for it without naming the run, right after
# `before_node_run` has returned in the same context.
_streams_node: ContextVar[bool] = ContextVar("agx_streams_node", default=False)


@dataclass(eq=False, slots=True)
class _ObservedRun:
    """A run whose hooks are being called."""

    recorder: Recorder
    error: BaseException | None = None
    entered: bool = False
    task: DrivingTask = field(default_factory=DrivingTask)


@dataclass
class AgxCapability(AbstractCapability[Any]):
    """Streams and observes an agent that is driven with plain `agent.run()`, `run_stream()` or `iter()`.

    The ids are taken from the run's deps where those are a `Deps`. Without ids the run is observed (facts, spans), not
    streamed. A sub-agent in another run's tool takes no session: its events are on that run's stream, with the origin
    `sub-agent`. Sessions are saved by `agx.run()` only. It raises when the run starts, not when it is made.

    With ids, an answer is streamed where that changes nothing else (`find_obstacle()`). Elsewhere, and without ids, a
    request is sent as the caller sends it, and the events of a complete response are made from the response.

    Args:
        scope_id: the tenant; all three ids, or none of them.
        user_id: the user.
        session_id: the conversation.
        id: pydantic-ai's name of the capability; leave it, or everything would be recorded twice.

    Raises:
        SessionBusyError: the session has a live run.
        RedisUnavailableError: a streamed run can't reach Redis within 2 s.
        TypeError: an id is neither an int nor a str.
        ValueError: an id has a character that none may have, or only some of the three are given.
    """

    scope_id: Id | None = None
    user_id: Id | None = None
    session_id: Id | None = None
    _: KW_ONLY
    id: str | None = _ID
    _recorder: Recorder | None = field(default=None, repr=False)  # set where `agx.run()` begins and ends the run
    _runs: dict[str | None, _ObservedRun] = field(default_factory=dict, init=False, repr=False, compare=False)

    def get_ordering(self) -> CapabilityOrdering:
        """Outside upstream's instrumentation, so that `invoke_agent` hangs under `agx.run`."""
        return CapabilityOrdering(position="outermost", wraps=[Instrumentation])

    @property
    def has_wrap_run_event_stream(self) -> bool:
        """Return whether pydantic-ai has to stream the node that begins; it asks before each node."""
        return _streams_node.get()

    def listens_to(self, event: AgentStreamEvent) -> bool:
        """Nothing here is an `@on_event` listener; upstream would look for one at each token."""
        return False

    async def for_run(self, ctx: RunContext[Any]) -> AbstractCapability[Any]:
        """Return the capability itself, with upstream's instrumentation where an SDK listens and nothing instruments.

        Not a copy: pydantic-ai would then call a dynamic model selector once more.
        """
        own = self if ctx.run_id not in self._runs else replace(self)
        if not isinstance(ctx.tracer, NoOpTracer) or has_no_sdk():
            return own
        settings = InstrumentationSettings(include_content=captures_content())
        return CombinedCapability([own, await Instrumentation(settings).for_run(ctx)])

    # --- the run ---

    async def wrap_run(self, ctx: RunContext[Any], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        if self._recorder is not None:
            with self._observed(_ObservedRun(self._recorder), ctx):
                return await handler()
        life = await self._open(ctx)
        run = _ObservedRun(life.recorder)
        try:
            with Attached(life.recorder.span.context), self._observed(run, ctx):
                result = await handler()
        except BaseException as error:
            await life.close(classify(run.error or error, life.recorder.state, _cancel_source(ctx, run)))
            raise
        await life.close(Ending("completed"))
        await life.recorder.steered.remove()
        return result

    async def _open(self, ctx: RunContext[Any]) -> RunLifecycle:
        engine = current_engine()
        agent = (ctx.agent.name if ctx.agent is not None else None) or "agent"
        outer = enclosing_recorder()
        ids = (self.scope_id, self.user_id, self.session_id)
        if ids == (None, None, None) and isinstance(ctx.deps, Deps):
            ids = (ctx.deps.get_scope_id(), ctx.deps.user_id, ctx.deps.session_id)
        scope, user, session = ids
        if outer is not None:
            return open_observed(engine, agent, outer.scope)
        if scope is None and user is None and session is None:
            return open_observed(engine, agent, "")
        if scope is None or user is None or session is None:
            raise ValueError("AgxCapability takes all of scope_id, user_id and session_id, or none of them")
        keys = SessionKeys.of(engine.config.key_prefix, scope, user, session)
        follows = ctx.deps.follows if isinstance(ctx.deps, Deps) else None
        return await open_streamed(engine, agent, keys, follows=follows)

    @contextmanager
    def _observed(self, run: _ObservedRun, ctx: RunContext[Any]) -> Iterator[None]:
        recorder = run.recorder
        self._runs[ctx.run_id] = run
        if (parent := recorder.parent) is not None:
            parent.tools.observed_runs[ctx.run_id] = ctx.cancel if recorder.session is None else None
        recorder.stop = ctx.cancel
        if recorder.state.must_stop:
            ctx.cancel()
        try:
            with working_in(recorder):
                yield
        finally:
            recorder.stop = None
            if parent is not None:
                parent.tools.observed_runs[ctx.run_id] = None
            if recorder.state.cancel_reason is not None:
                for cancel in filter(None, recorder.tools.observed_runs.values()):
                    recorder.engine.supervisor.call(cancel, name="agx-recorder")  # no tool waits for its task
            del self._runs[ctx.run_id]

    async def before_run(self, ctx: RunContext[Any]) -> None:
        if (run := self._runs.get(ctx.run_id)) is not None:
            run.entered = True

    async def on_run_error(self, ctx: RunContext[Any], *, error: BaseException) -> AgentRunResult[Any]:
        if (run := self._runs.get(ctx.run_id)) is not None:
            run.error = error
        raise error

    # --- nodes ---

    # Not `wrap_node_run`: every coroutine between the loop and the model is gone through several times a token.

    async def before_node_run(self, ctx: RunContext[Any], *, node: AgentNode[Any]) -> AgentNode[Any]:
        # The only node hook that the final node of `run_stream()` fires: that one ends with its run, too.
        if (run := self._runs.get(ctx.run_id)) is not None:
            run.task.note()
        kind, recorder = _NODE_KINDS.get(type(node)), self._recorder_of(ctx)
        streams = False
        if kind is not None and recorder is not None:
            recorder.steered.begin(ctx)
            request = node.request if isinstance(node, ModelRequestNode) else None
            if recorder.journal is not None and request is not None:
                if recorder.journal.hand_over:
                    raise RunHandedOverError
                await _wait_recorded(recorder)  # a tool's result is recorded before the model sees it
            recorder.begin_node(kind, ctx.model if isinstance(ctx.model, Model) else None, request)
            recorder.messages = ctx.messages
            # The tools of a streamed node end before their run does, a cancelled one too. Nothing else differs.
            streams = kind == "call_tools" or (kind == "model_request" and self._may_stream(ctx, recorder))
        _streams_node.set(streams)
        return node

    async def after_node_run(
        self, ctx: RunContext[Any], *, node: AgentNode[Any], result: NodeResult[Any]
    ) -> NodeResult[Any]:
        if (recorder := self._recorder_of(ctx)) is not None and type(node) in _NODE_KINDS:
            recorder.end_node("completed", None)
            if isinstance(result, End):
                await recorder.steered.close(recorder.run_id)
        return result

    async def on_node_run_error(
        self, ctx: RunContext[Any], *, node: AgentNode[Any], error: Exception
    ) -> NodeResult[Any]:
        # A cancelled node has neither of these two hooks: it ends with its run.
        if (recorder := self._recorder_of(ctx)) is not None and type(node) in _NODE_KINDS:
            recorder.fail_node(error)
        raise error

    def _recorder_of(self, ctx: RunContext[Any]) -> Recorder | None:
        run = self._runs.get(ctx.run_id)
        return None if run is None else run.recorder

    def _may_stream(self, ctx: RunContext[Any], recorder: Recorder) -> bool:
        """Return whether the next model request is to be streamed although the caller may not stream it."""
        if recorder.events.writer is None:
            return False  # nobody listens
        if (obstacle := find_obstacle(ctx.model, ctx.root_capability)) is None:
            return True
        report_obstacle(recorder.agent, obstacle)
        return False

    # --- events ---

    def wrap_run_event_stream(
        self, ctx: RunContext[Any], *, stream: AsyncIterable[AgentStreamEvent]
    ) -> AsyncIterable[AgentStreamEvent]:
        if (recorder := self._recorder_of(ctx)) is None:
            return stream
        if (tools := ctx.tool_manager) is not None:
            recorder.tools.manager = tools
        return ObservedStream(stream, recorder)

    async def wrap_model_request(
        self, ctx: RunContext[Any], *, request_context: ModelRequestContext, handler: WrapModelRequestHandler
    ) -> ModelResponse:
        if (recorder := self._recorder_of(ctx)) is None:
            return await handler(request_context)
        with Attached(recorder.begin_model(request_context)):
            response = await handler(request_context)
        recorder.steered.deliver()
        recorder.engine.supervisor.call(partial(recorder.end_model, response), name="agx-recorder")
        return response

    # --- tools ---

    async def wrap_tool_execute(
        self,
        ctx: RunContext[Any],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: ValidatedToolArgs,
        handler: WrapToolExecuteHandler,
    ) -> Any:
        if (recorder := self._recorder_of(ctx)) is None or tool_def.kind == "output":
            return await handler(args)
        if recorder.journal is not None:
            if (recorded := recorder.journal.recorded_return(call)) is not None:
                return replay_return(recorded)
            if recorder.journal.was_interrupted(call) and (tool_def.metadata or {}).get("on_resume") != "retry":
                raise ToolFailed(_INTERRUPTED)
            await _wait_recorded(recorder)  # a call that may have acted is known to the next attempt
        tool, task = recorder.tools.begin(call), DrivingTask()
        try:
            with Attached(recorder.tool_context(tool)), capture_run_messages() as messages:
                try:
                    with working_in(recorder, tool.call_id):
                        result = await handler(args)
                finally:
                    recorder.tools.add_plain_run(tool, messages)
        except (CallDeferred, ApprovalRequired):
            recorder.tools.defer(tool)
            raise
        except (ModelRetry, ToolRetryError):
            recorder.tools.end(tool, "retry")
            raise
        except SkipToolExecution:
            recorder.tools.end(tool, "ok")
            raise
        except asyncio.CancelledError as error:
            if recorder.state.must_stop or task.is_cancelled or cancel_was_requested(ctx) or run_timed_out(ctx):
                recorder.tools.end(tool, "cancelled")
            else:
                # Nobody asked for it: the tool awaited something that was cancelled elsewhere.
                recorder.tools.end(tool, "error", error)
            raise
        except BaseException as error:
            recorder.tools.end(tool, "error", error)
            raise
        recorder.tools.end(tool, "ok")
        return result


async def _wait_recorded(recorder: Recorder) -> None:
    """Wait until the checkpoints so far are recorded; raises RunHandedOverError where another process goes on."""
    await recorder.events.wait_recorded()
    if recorder.state.fenced:
        raise RunHandedOverError  # the cancellation that follows would come after the next step's first await


def _cancel_source(ctx: RunContext[Any], run: _ObservedRun) -> CancelSource:
    return CancelSource(
        task=run.task.is_cancelled,
        run=cancel_was_requested(ctx),
        timeout=run_timed_out(ctx),
        abandoned=run.error is None and run.entered,
    )
