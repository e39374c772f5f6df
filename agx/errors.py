"""The errors of agx: one tree, and each message says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage
    from pydantic_ai.run import AgentRunResult


class AgxError(Exception):
    """The root of every error that agx raises on purpose."""


class NotConfiguredError(AgxError):
    """Raised when the runtime is used before `configure()`."""

    def __init__(self) -> None:
        super().__init__("agx is not configured: call agx.configure(agx.Config(redis=...)) once at startup")


class RedisUnavailableError(AgxError):
    """Raised when Redis can't be reached at the start of a run, or for a call that has to have its answer."""

    def __init__(self, doing: str, cause: BaseException | str) -> None:
        # The cause's type and text only: a URL in it would carry the password.
        what = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"Redis could not be reached to {doing} ({what}): check that it runs and that agx may use it")


class BodyError(AgxError, TypeError):
    """Raised when an event's body is not a JSON object."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"an event's body must be a dict of JSON values ({cause}): convert it before it is added")


class SessionBusyError(AgxError):
    """Raised when a session already has a live run; one session has at most one."""

    def __init__(self, session: str) -> None:
        super().__init__(f"session {session!r} has a live run: wait for its `end`, or cancel() it first")


class MessagesError(AgxError):
    """An error that carries what the agent had said by then, in `.messages`."""

    def __init__(self, message: str, messages: Sequence[ModelMessage] = ()) -> None:
        super().__init__(message)
        self.messages: list[ModelMessage] = list(messages)


class AgxCanceledError(MessagesError):
    """Raised by `run()` when the run was cancelled; `.messages` holds the partial conversation, `.reason` why."""

    def __init__(self, messages: Sequence[ModelMessage] = (), *, reason: str = "cancel") -> None:
        super().__init__(f"the run was cancelled ({reason}); .messages holds what it had said", messages)
        self.reason = reason


class LeaseLostError(MessagesError):
    """Raised by `run()` when another run, or the reaper, took the session over; this run has written nothing since."""

    def __init__(self, messages: Sequence[ModelMessage] = ()) -> None:
        super().__init__(
            "the run lost its lease to another run or was declared lost while this process was stalled; "
            ".messages holds what it had said",
            messages,
        )


class SessionSaveError(MessagesError):
    """Raised when `session.save()` failed; `.result` (None unless the agent completed) and `.messages` are kept."""

    def __init__(self, cause: BaseException, messages: Sequence[ModelMessage], result: AgentRunResult[object] | None):
        super().__init__(
            f"session.save() failed ({type(cause).__name__}); store .messages yourself, .result holds the answer",
            messages,
        )
        self.result = result


class SessionConflictError(AgxError):
    """Raised by `save()` when the stored conversation changed after `load()`; nothing was overwritten."""

    def __init__(self, session: str) -> None:
        super().__init__(
            f"session {session!r} was saved by someone else after it was loaded: load it again and repeat the turn"
        )


class ConversationChangedError(AgxError):
    """Raised when a page decides on, or asks again for, what is no longer at the end of the stored conversation."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the stored conversation is not the one that was shown ({what}): load it again")


class RunFailedError(AgxError):
    """Raised by `agx.replay.replay()` when the run failed, was lost, or was replaced by another before its end."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the run has no answer: {what}")
