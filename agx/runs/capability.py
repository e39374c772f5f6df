"""The capability: pydantic-ai's hooks, translated for the recorder, however the agent is driven."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from opentelemetry.trace import NoOpTracer
from pydantic_ai import RunContext, _agent_graph
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
    RunCancelled,
    RunTimedOut,
    SkipToolExecution,
    ToolRetryError,
)
from pydantic_ai.messages import AgentStreamEvent, ModelResponse, ToolCallPart
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import ToolDefinition

from ..engine.registry import current_engine
from ..facts.schema import NodeKind
from ..redis.keys import Id, SessionKeys
from ..telemetry.tracing import attached, captures_content, has_no_sdk
from .deps import Deps
from .live_run import LiveRun, current_recorder, enclosing_recorder
from .model_request import can_stream
from .outcome import Ending
from .recorder import Recorder

_ID = "agx"  # fixed: of two instances without one both would fire and everything would double

_NODE_KINDS: dict[type, NodeKind] = {
    _agent_graph.UserPromptNode: "user_prompt",
    _agent_graph.ModelRequestNode: "model_request",
    _agent_graph.CallToolsNode: "call_tools",
}


@dataclass
class AgxCapability(AbstractCapability[Any]):
    """Streams and observes an agent that is driven with plain `agent.run()`, `run_stream()` or `iter()`.

    The ids are taken from the run's deps where those are a `Deps`. Without ids the run is observed (facts, spans), not
    streamed; so is a sub-agent inside another run's tool. Sessions are saved by `agx.run()` only. It raises when the
    run starts, not when it is made.

    Args:
        scope_id: the tenant; all three ids, or none of them.
        user_id: the user.
        session_id: the conversation.
        id: pydantic-ai's name of the capability; leave it, or everything would be told twice.

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
    _streams: bool = field(default=False, repr=False)
    _error: BaseException | None = field(default=None, repr=False)
    _entered: bool = field(default=False, repr=False)

    def get_ordering(self) -> CapabilityOrdering:
        """Outside upstream's instrumentation, so that `invoke_agent` hangs under `agx.run`."""
        return CapabilityOrdering(position="outermost", wraps=[Instrumentation])

    @property
    def has_wrap_run_event_stream(self) -> bool:
        """Hooking the event stream makes pydantic-ai stream, and a model that can't would fail: decided per run."""
        return self._streams

    def listens_to(self, event: AgentStreamEvent) -> bool:
        """Nothing here is an `@on_event` listener; upstream would look for one at each token."""
        return False

    async def for_run(self, ctx: RunContext[Any]) -> AbstractCapability[Any]:
        """Return this run's own copy, with upstream's instrumentation where a SDK listens and nothing instruments."""
        own = replace(self, _streams=can_stream(ctx.model), _error=None, _entered=False)
        if not isinstance(ctx.tracer, NoOpTracer) or has_no_sdk():
            return own
        settings = InstrumentationSettings(include_content=captures_content())
        return CombinedCapability([own, await Instrumentation(settings).for_run(ctx)])

    # --- the run ---

    async def wrap_run(self, ctx: RunContext[Any], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        if self._recorder is not None:
            with self._driving(self._recorder, ctx):
                return await handler()
        live = await self._open(ctx)
        self._recorder = live.recorder
        try:
            with attached(live.recorder.span.context), self._driving(live.recorder, ctx):
                result = await handler()
        except BaseException as error:
            await live.close(self._classify(ctx, error))
            raise
        await live.close(Ending("completed"))
        return result

    async def _open(self, ctx: RunContext[Any]) -> LiveRun:
        engine = current_engine()
        agent = (ctx.agent.name if ctx.agent is not None else None) or "agent"
        outer = enclosing_recorder()
        ids = (self.scope_id, self.user_id, self.session_id)
        if ids == (None, None, None) and isinstance(ctx.deps, Deps):
            ids = (ctx.deps.get_scope_id(), ctx.deps.user_id, ctx.deps.session_id)
        scope, user, session = ids
        if outer is not None:
            return await LiveRun.open(engine, agent=agent, session=None, scope=outer.scope)
        if scope is None and user is None and session is None:
            return await LiveRun.open(engine, agent=agent, session=None, scope="")
        if scope is None or user is None or session is None:
            raise ValueError("AgxCapability takes all of scope_id, user_id and session_id, or none of them")
        keys = SessionKeys.of(engine.config.key_prefix, scope, user, session)
        follows = ctx.deps.follows if isinstance(ctx.deps, Deps) else None
        return await LiveRun.open(engine, agent=agent, session=keys, scope=keys.scope, follows=follows)

    @contextmanager
    def _driving(self, recorder: Recorder, ctx: RunContext[Any]) -> Iterator[None]:
        recorder.stop = ctx.cancel
        if recorder.cancel_reason is not None or recorder.standing.fenced:
            ctx.cancel()
        token = current_recorder.set(recorder)
        try:
            yield
        finally:
            recorder.stop = None
            current_recorder.reset(token)

    async def before_run(self, ctx: RunContext[Any]) -> None:
        self._entered = True

    async def on_run_error(self, ctx: RunContext[Any], *, error: BaseException) -> AgentRunResult[Any]:
        self._error = error
        raise error

    def _classify(self, ctx: RunContext[Any], raised: BaseException) -> Ending:
        """Tell how a run ended that is driven from outside: here every kind of cancel is a bare CancelledError."""
        recorder, error = self._recorder, self._error
        assert recorder is not None
        reason = recorder.cancel_reason
        if isinstance(error or raised, asyncio.CancelledError):
            # Private, but nothing public tells `ctx.cancel()` from a cancelled task while the run unwinds.
            upstream = getattr(ctx, "_cancellation", None)
            if getattr(upstream, "timed_out", False):
                return Ending("failed", error=RunTimedOut("the run's timeout passed"))
            if reason is None and (outer := recorder.parent) is not None:
                reason = outer.cancel_reason
            if reason is None and error is None and self._entered:
                reason = "abandoned"
            if reason is None:
                reason = "cancel" if getattr(upstream, "cancel_requested", False) else "task"
            return Ending("cancelled", reason)
        if isinstance(error, RunCancelled) and not isinstance(error, RunTimedOut):
            return Ending("cancelled", reason or "cancel")
        return Ending("failed", error=error or raised)

    # --- nodes ---

    # Not `wrap_node_run`: every coroutine between the loop and the model is gone through several times a token.

    async def before_node_run(self, ctx: RunContext[Any], *, node: AgentNode[Any]) -> AgentNode[Any]:
        # The only node hook that the final node of `run_stream()` fires: that one ends with its run, too.
        self._begin_node(ctx, node)
        return node

    async def after_node_run(
        self, ctx: RunContext[Any], *, node: AgentNode[Any], result: NodeResult[Any]
    ) -> NodeResult[Any]:
        if self._recorder is not None and type(node) in _NODE_KINDS:
            self._recorder.end_node("completed", None)
        return result

    async def on_node_run_error(
        self, ctx: RunContext[Any], *, node: AgentNode[Any], error: Exception
    ) -> NodeResult[Any]:
        # A cancelled node has neither of these two hooks: it ends with its run.
        if self._recorder is not None and type(node) in _NODE_KINDS:
            self._recorder.fail_node(error)
        raise error

    def _begin_node(self, ctx: RunContext[Any], node: AgentNode[Any]) -> None:
        kind = _NODE_KINDS.get(type(node))
        if kind is not None and self._recorder is not None:
            self._recorder.begin_node(kind, ctx.model if isinstance(ctx.model, Model) else None)
            self._recorder.messages = ctx.messages

    # --- events ---

    def wrap_run_event_stream(
        self, ctx: RunContext[Any], *, stream: AsyncIterable[AgentStreamEvent]
    ) -> AsyncIterable[AgentStreamEvent]:
        return stream if self._recorder is None else _Observed(stream, self._recorder.on_event)

    async def wrap_model_request(
        self, ctx: RunContext[Any], *, request_context: ModelRequestContext, handler: WrapModelRequestHandler
    ) -> ModelResponse:
        if (recorder := self._recorder) is None:
            return await handler(request_context)
        with attached(recorder.begin_model(request_context)):
            response = await handler(request_context)
        recorder.end_model(response)
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
        if (recorder := self._recorder) is None or tool_def.kind == "output":
            return await handler(args)
        tool = recorder.begin_tool(call)
        try:
            with attached(recorder.tool_context(tool)):
                result = await handler(args)
        except (CallDeferred, ApprovalRequired):
            recorder.end_tool(tool, "deferred")
            raise
        except (ModelRetry, ToolRetryError):
            recorder.end_tool(tool, "retry")
            raise
        except SkipToolExecution:
            recorder.end_tool(tool, "ok")
            raise
        except asyncio.CancelledError:
            recorder.end_tool(tool, "cancelled")
            raise
        except BaseException as error:
            recorder.end_tool(tool, "error", error)
            raise
        recorder.end_tool(tool, "ok")
        return result


class _Observed(AsyncIterator[AgentStreamEvent]):
    """An event stream that shows each event as it passes; half the cost of a generator, on the token path."""

    def __init__(self, stream: AsyncIterable[AgentStreamEvent], on_event: Callable[[AgentStreamEvent], None]) -> None:
        self._stream = stream
        self._next = aiter(stream).__anext__
        self._on_event = on_event

    async def __anext__(self) -> AgentStreamEvent:
        event = await self._next()
        self._on_event(event)
        return event

    async def aclose(self) -> None:
        if isinstance(self._stream, AsyncGenerator):
            await self._stream.aclose()
