"""The errors of agx: one tree of exceptions.

Nothing here imports pydantic-ai: commands and the sidecar start without it.
"""

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


class QueueFullError(AgxError):
    """Raised when as much waits as may wait: jobs of a scope, or messages of a session."""

    def __init__(self, who: str, most: str) -> None:
        super().__init__(f"{most} of {who} wait, the most that may wait: try again later")


class TextError(AgxError, ValueError):
    """Raised when a text for a run, or the title of a conversation, can't be taken."""


class NotPendingError(AgxError):
    """Raised by `decide()` where no such call waits in the session."""


class RunUnknownError(AgxError, LookupError):
    """Raised by `feedback()` for a run that the session does not have, that has not ended, or that is too old."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"the session has no run {run_id!r} that has ended, or Redis no longer has its facts")


class SessionUnknownError(AgxError, LookupError):
    """Raised for a conversation that the store does not have, or that is another user's."""

    def __init__(self, session: str) -> None:
        super().__init__(f"no conversation {session!r} of this user is stored")


class BranchError(AgxError, ValueError):
    """Raised where a conversation can't be branched at a message."""


class JobError(AgxError, TypeError, ValueError):
    """Raised by `submit()` and `run(resume=...)` for an argument that can't be used; Redis was not asked."""


class RecipeError(AgxError):
    """The error of a run whose recipe raised, or made a run for other ids."""

    def __init__(self, agent: str, cause: BaseException) -> None:
        super().__init__(f"the recipe of agent {agent!r} raised {type(cause).__name__}: see the worker's log")


class AgentNotServedError(AgxError):
    """The error of a submitted run whose agent no worker served for as long as the run may wait."""

    def __init__(self, agent: str) -> None:
        super().__init__(f"no worker has a recipe for agent {agent!r}: start one, or correct the name in submit()")


class AttemptsExhaustedError(AgxError):
    """The error of a submitted run whose recipe stopped its worker each time."""

    def __init__(self, attempts: int) -> None:
        super().__init__(f"{attempts} workers stopped before the run began: look for what its recipe does")


class SteeredError(AgxError):
    """Raised by `run(on_busy="steer")` where the live run takes the prompt; `.run_id` is that run's."""

    def __init__(self, run_id: str) -> None:
        super().__init__("the session's live run takes the prompt: follow it with listen()")
        self.run_id = run_id


class RunHandedOverError(AgxError):
    """Raised where another process goes on with the run; this one has written nothing since."""

    def __init__(self) -> None:
        super().__init__("the run was handed over, another worker goes on with it: follow it with listen()")


class MessagesError(AgxError):
    """An error that carries the messages of the run up to the error, in `.messages`."""

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
    """Raised by `agx.replay.replay()` when the run failed, was lost, or was replaced by another before its end.

    Its text is the one that listeners get, `.code` a row of the error catalogue.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
