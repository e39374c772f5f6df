"""The private names of pydantic-ai that agx reads: nothing public gives the same answer.

Each function returns its neutral answer when a name is gone; `tests/unit/test_private_api.py` then fails.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

from pydantic_ai import RunContext
from pydantic_ai.capabilities import Hooks
from pydantic_ai.messages import ModelRequestAttempt
from pydantic_ai.run import AgentRun

from ..checkpoints.codec import Pending
from ..checkpoints.journal import Snapshot


def run_timed_out(ctx: RunContext[Any]) -> bool:
    """Return whether pydantic-ai cancelled the run because its own `timeout=` passed."""
    return bool(getattr(getattr(ctx, "_cancellation", None), "timed_out", False))


def cancel_was_requested(ctx: RunContext[Any]) -> bool:
    """Return whether `ctx.cancel()` or a token stopped the run, and not a cancellation of its task."""
    return bool(getattr(getattr(ctx, "_cancellation", None), "cancel_requested", False))


def has_registered_hook(hooks: Hooks[Any], names: Container[str]) -> bool:
    """Return whether a function is registered with a `Hooks` under one of these names; True where that is unknown."""
    registry = getattr(hooks, "_registry", None)
    return True if registry is None else any(name in names and entries for name, entries in registry.items())


def carried_attempts(error: BaseException) -> Sequence[ModelRequestAttempt]:
    """Return the attempts of a fallback model before `error` ended its request; a cancellation carries them too."""
    return getattr(error, "_pydantic_ai_failed_attempts", ())


def take_snapshot(agent_run: AgentRun[Any, Any]) -> Snapshot:
    """Return where an agent's run stands, for its checkpoint."""
    state = agent_run.ctx.state
    return Snapshot(
        messages=agent_run.all_messages(),
        usage=state.usage,
        output_retries=state.output_retries_used,
        pending=[
            Pending(tuple(one.messages), one.priority, (getattr(one, "_tool_call", None) or (None,))[0])
            for one in state.pending_messages
        ],
    )


def restore_pending(agent_run: AgentRun[Any, Any], pending: Iterable[Pending]) -> None:
    """Enqueue what an earlier attempt enqueued and did not deliver, each beside the tool result where it belongs."""
    queue = agent_run.ctx.state.pending_messages
    for one in pending:
        agent_run.enqueue(*one.messages, priority=one.priority)
        if one.tool_call_id is not None:
            # `enqueue()` finds the tool call only while the tool runs; this one ran before the run's first step here.
            queue[-1]._tool_call = (one.tool_call_id, agent_run.ctx.state.run_step)
