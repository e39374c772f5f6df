"""How a run, a node or a tool ended: in facts and spans, for listeners (without an exception's text), in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from pydantic_ai.exceptions import (
    ContentFilterError,
    FallbackExceptionGroup,
    ModelAPIError,
    RunCancelled,
    RunTimedOut,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
)

from ..error_codes import (
    AGENT_NOT_SERVED,
    ATTEMPTS_EXHAUSTED,
    CONTENT_REFUSED,
    CONVERSATION_CHANGED,
    LIMIT_REACHED,
    MODEL_ANSWER_UNUSABLE,
    MODEL_FAILED,
    NOT_FOUND,
    QUEUE_FULL,
    REDIS_UNAVAILABLE,
    REQUEST_UNREADABLE,
    RUN_CANCELED,
    RUN_FAILED,
    RUN_TIMED_OUT,
    RUN_UNKNOWN,
    SESSION_BUSY,
    SESSION_NOT_SAVED,
    SESSION_UNKNOWN,
    ErrorCode,
)
from ..errors import (
    AgentNotServedError,
    AttemptsExhaustedError,
    BranchError,
    ConversationChangedError,
    JobError,
    NotPendingError,
    QueueFullError,
    RedisUnavailableError,
    RunUnknownError,
    SessionBusyError,
    SessionConflictError,
    SessionSaveError,
    SessionUnknownError,
    TextError,
)
from ..facts.schema import Outcome, Reason
from ..stream.entry import Body
from ..telemetry.tracing import captures_content
from .state import RunState

logger = logging.getLogger("agx")

DescribeError = Callable[[BaseException], str]

_MOST_TEXT = 1_000  # characters of an exception's message

# The first row that matches counts: ContentFilterError is an UnexpectedModelBehavior.
_BY_TYPE: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], ErrorCode], ...] = (
    (ContentFilterError, CONTENT_REFUSED),
    (UsageLimitExceeded, LIMIT_REACHED),
    ((RunTimedOut, TimeoutError), RUN_TIMED_OUT),
    ((ModelAPIError, FallbackExceptionGroup), MODEL_FAILED),
    (UnexpectedModelBehavior, MODEL_ANSWER_UNUSABLE),
    (QueueFullError, QUEUE_FULL),
    (RunUnknownError, RUN_UNKNOWN),
    (NotPendingError, NOT_FOUND),
    (SessionUnknownError, SESSION_UNKNOWN),
    ((JobError, TextError), REQUEST_UNREADABLE),
    (SessionBusyError, SESSION_BUSY),
    ((ConversationChangedError, SessionConflictError, BranchError), CONVERSATION_CHANGED),
    (AgentNotServedError, AGENT_NOT_SERVED),
    (AttemptsExhaustedError, ATTEMPTS_EXHAUSTED),
    (RedisUnavailableError, REDIS_UNAVAILABLE),
    (SessionSaveError, SESSION_NOT_SAVED),
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    outcome: Outcome
    reason: Reason | None = None
    error: BaseException | None = None
    seen_as: ErrorCode | None = None  # what end users see; by default that of the error's type

    @property
    def error_type(self) -> str | None:
        return describe_type(self.error)

    @property
    def message(self) -> str | None:
        return describe_message(self.error)


@dataclass(frozen=True, slots=True)
class CancelSource:
    """Where a bare `CancelledError` may come from; the exception itself does not show it."""

    task: bool  # the driving task was cancelled
    run: bool = False  # pydantic-ai's own cancel of the run was called
    timeout: bool = False  # the run's own timeout passed
    abandoned: bool = False  # the caller stopped driving the run before its end


def classify(error: BaseException, state: RunState, source: CancelSource) -> Ending:
    """Return how a run ended whose agent raised `error`."""
    if isinstance(error, RunTimedOut):
        return Ending("failed", error=error)
    if isinstance(error, RunCancelled):
        return Ending("cancelled", state.cancel_reason or "cancel")
    if not isinstance(error, asyncio.CancelledError):
        return Ending("failed", error=error)
    if source.timeout:
        return Ending("failed", error=RunTimedOut("the run's timeout passed"))
    if state.cancel_reason is not None:
        return Ending("cancelled", state.cancel_reason)
    if source.abandoned:
        return Ending("cancelled", "abandoned")
    if source.run:
        return Ending("cancelled", "cancel")
    if source.task:
        return Ending("cancelled", "task")
    # Nobody asked for it: the agent awaited something that was cancelled elsewhere.
    return Ending("failed", error=error)


def classify_error(error: BaseException) -> ErrorCode:
    """Return what end users see of an exception: by its type only, never by its text."""
    return next((row for types, row in _BY_TYPE if isinstance(error, types)), RUN_FAILED)


def describe_type(error: BaseException | None) -> str | None:
    """Return an exception's type as `error.type` has it."""
    if error is None:
        return None
    kind = type(error)
    is_plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


def describe_message(error: BaseException | None) -> str | None:
    """Return an exception's message where content may leave: it may quote the prompt."""
    return describe_text(error)[:_MOST_TEXT] if error is not None and captures_content() else None


def describe_text(error: BaseException) -> str:
    """Return an exception's text; never raises, though a user's `__str__` may."""
    try:
        return str(error)
    except (Exception, asyncio.CancelledError):
        return f"({type(error).__name__}, whose text can't be read)"


def make_error_body(ending: Ending, describe: DescribeError | None) -> Body | None:
    """Return the body of the `error` event that stands before the `end`; None where the run completed.

    Args:
        ending: how the run ended.
        describe: `Config.describe_error`; where it raises, or returns no text, the catalogue's sentence is used.
    """
    if ending.outcome == "cancelled":
        return {"msg": RUN_CANCELED.sentence, "code": RUN_CANCELED.code}
    if ending.error is None:
        return None
    kind = ending.seen_as or classify_error(ending.error)
    text = None if describe is None else _describe(ending.error, describe)
    return {"msg": text or kind.sentence, "error_type": ending.error_type, "code": kind.code}


def _describe(error: BaseException, describe: DescribeError) -> str | None:
    try:
        text = describe(error)
    except (Exception, asyncio.CancelledError) as raised:  # it is the user's code, and the run has to end
        logger.warning("agx: describe_error raised %s: listeners get the default text", describe_type(raised))
        return None
    return text if isinstance(text, str) else None


def log_failure(
    error: BaseException,
    tool_error: tuple[BaseException, str] | None,
    *,
    run_id: str,
    session: str | None,
    agent: str,
) -> None:
    """Write the one record of a failed run, with the traceback, for those who operate the service.

    Args:
        tool_error: the last exception that a tool raised, and the tool.
        session: `scope/user/session`; None for a run without a session.
    """
    if isinstance(error, ConversationChangedError):
        return  # the client's request was outdated, and its answer shows it: nothing has failed
    tool = None
    if tool_error is not None and (tool_error[0] is error or tool_error[0] is error.__cause__):
        tool = tool_error[1]
    fields = {"run_id": run_id, "session": session, "agent": agent, "tool": tool}
    logger.error("agx: run %s failed: session %s, agent %s, tool %s", *fields.values(), exc_info=error, extra=fields)
