"""The catalogue of the errors that end users see: a code, a sentence, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """A kind of error that end users see: in the `error` event of a run, in a replay, or in an answer of a router.

    Args:
        code: what programs compare; never changes.
        sentence: what people read; has no text of an exception in it.
        cause: when it occurs, for the page of the catalogue.
        action: what to do, likewise.
        http_status: of a router's answer; None where it is an event of a run.
    """

    code: str
    sentence: str
    cause: str
    action: str
    http_status: int | None = None


RUN_CANCELED = ErrorCode(
    "run_canceled",
    "canceled",  # the text that clients of the first release compare
    "Somebody cancelled the run, or its process was shut down.",
    "Ask again if the answer is still needed.",
)
RUN_FAILED = ErrorCode(
    "run_failed",
    "The run failed because of an internal error.",
    "The agent, one of its tools or the session's `load()` raised an exception.",
    "Read the service's log: the record of the run has the traceback.",
)
MODEL_FAILED = ErrorCode(
    "model_failed",
    "The model could not be reached, or it refused the request.",
    "The model's provider answered with an error, or did not answer.",
    "Try again later. The service's log has the provider's answer.",
)
MODEL_ANSWER_UNUSABLE = ErrorCode(
    "model_answer_unusable",
    "The model's answer could not be used.",
    "The model's output did not pass validation as often as the agent allows, or the response was malformed.",
    "Try again. If it repeats, the agent's output type or its tools need a change.",
)
CONTENT_REFUSED = ErrorCode(
    "content_refused",
    "The model's provider refused this content.",
    "The provider's content filter stopped the request or the answer.",
    "Change the prompt.",
)
LIMIT_REACHED = ErrorCode(
    "limit_reached",
    "The run reached its usage limit.",
    "The run needed more requests, tokens or tool calls than its `usage_limits` allow.",
    "Ask for less in one turn, or raise the limit in the service.",
)
RUN_TIMED_OUT = ErrorCode(
    "run_timed_out",
    "The run took longer than it may.",
    "A time-out of the run, of its model or of a tool passed.",
    "Try again, or raise the time-out in the service.",
)
SESSION_NOT_SAVED = ErrorCode(
    "session_not_saved",
    "The answer could not be stored.",
    "`session.save()` raised an exception after the agent had completed.",
    "Ask again. The service's log says why the store refused.",
)
RUN_LOST = ErrorCode(
    "run_lost",
    "The run was lost: the process that ran it has stopped.",
    "The process was killed, or lost its connection to Redis for longer than its lease lasts.",
    "Ask again. What was already answered is kept.",
)
ATTEMPTS_EXHAUSTED = ErrorCode(
    "attempts_exhausted",
    "The run was lost: each process that tried it has stopped.",
    "Several processes in a row died with this run before it made progress, so no other one tries it.",
    "Ask for something else, or tell the service's operators: the run itself may stop its process.",
)
AGENT_NOT_SERVED = ErrorCode(
    "agent_not_served",
    "No worker could run this agent.",
    "The agent's name is wrong, or no worker with a recipe for it has run for as long as the run may wait.",
    "For operators: start a worker with that recipe; `agx doctor` shows the names.",
)
RUN_REPLACED = ErrorCode(
    "run_replaced",
    "Another run of this session has replaced the run.",
    "A new run of the session began while an older one was replayed.",
    "Load the conversation again.",
)
EVENTS_EXPIRED = ErrorCode(
    "events_expired",
    "The rest of the run's events is not kept any more.",
    "The stream expired before a slow reader had read all of it. The run itself may have completed.",
    "Load the conversation again.",
)
REQUEST_UNREADABLE = ErrorCode(
    "request_unreadable",
    "The request can't be read.",
    "The body is not JSON, a field is missing, or a value has a wrong type or a character that none may have.",
    "Correct the request: `detail` names the first few fields.",
    422,
)
REQUEST_TOO_LARGE = ErrorCode(
    "request_too_large",
    "The request is too large.",
    "The body has more bytes than the router's `max_request` allows.",
    "Send less, or raise the limit of the router.",
    413,
)
CLIENT_OUTDATED = ErrorCode(
    "client_outdated",
    "This page is older than the service: load it again.",
    "The service was upgraded while the page was open, and its router no longer supports the page's `agx.js`.",
    "Load the page again. If the page has a copy of `agx.js`, replace it.",
    400,
)
QUEUE_FULL = ErrorCode(
    "queue_full",
    "Too much is waiting: try again later.",
    "The scope has as many waiting jobs as `max_waiting_jobs` allows, or the session as many steering messages.",
    "Try again later. For operators: start more workers.",
    429,
)
SESSION_BUSY = ErrorCode(
    "session_busy",
    "The session has a live run: wait for its end, or cancel it first.",
    "A session has at most one live run.",
    "Follow the live run, or cancel it.",
    409,
)
NOT_FOUND = ErrorCode(
    "not_found",
    "The session has no live run, or no such call waits in it.",
    "The run has ended, the session's next run has begun, or the session is another user's.",
    "Load the conversation again; to add a text, start a run with it.",
    404,
)
RUN_UNKNOWN = ErrorCode(
    "run_unknown",
    "The session has no such run.",
    "The run has not ended, it is too old, or it is not one of this user.",
    "Give feedback on a run that has ended, within a day or so.",
    404,
)
SESSION_UNKNOWN = ErrorCode(
    "session_unknown",
    "There is no such conversation.",
    "The conversation was deleted, it has expired, or it is another user's.",
    "List the conversations again.",
    404,
)
CONVERSATION_CHANGED = ErrorCode(
    "conversation_changed",
    "The stored conversation is not the one that was shown: load it again.",
    "The page decides on, or repeats, what is no longer at the end of the conversation.",
    "Load the conversation again.",
    409,
)
REDIS_UNAVAILABLE = ErrorCode(
    "redis_unavailable",
    "The service can't reach its storage, try again later.",
    "Redis did not answer within the time that the call allows.",
    "Try again later. For operators: check Redis, and that agx may use it.",
    503,
)

CATALOGUE: tuple[ErrorCode, ...] = tuple(value for value in list(globals().values()) if isinstance(value, ErrorCode))
