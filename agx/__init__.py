"""agx runs pydantic-ai agents for a service: followed, replayed, resumed, cancelled and measured from any process.

This is the menu of public names. A name's module is imported when the name is first used: `agx ls` and the sidecar
start without pydantic-ai, whose import takes a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.job import Job
    from .config import Config, configure
    from .control.cancellation import cancel
    from .control.feedback import feedback
    from .control.steering import steer
    from .engine.registry import aclose
    from .errors import (
        AgxCanceledError,
        AgxError,
        BodyError,
        BranchError,
        JobError,
        LeaseLostError,
        NotConfiguredError,
        NotPendingError,
        QueueFullError,
        RecipeError,
        RedisUnavailableError,
        RunFailedError,
        RunHandedOverError,
        RunUnknownError,
        SessionBusyError,
        SessionConflictError,
        SessionSaveError,
        SessionUnknownError,
        SteeredError,
        TextError,
    )
    from .jobs.decide import decide, pending
    from .jobs.deletion import delete_session
    from .jobs.recipe import Call
    from .jobs.submit import submit
    from .jobs.worker import Worker
    from .listeners.listener import listen
    from .listeners.manual import add, is_live, q, start, stop
    from .listeners.sse import sse
    from .runs.capability import AgxCapability
    from .runs.deps import Deps
    from .runs.runner import run
    from .sessions.base import Session, branch_session
    from .sessions.redis_session import RedisSession
    from .stream.events import Runtime

__version__ = "0.2.0"

__all__ = [
    "AgxCanceledError",
    "AgxCapability",
    "AgxError",
    "BodyError",
    "BranchError",
    "Call",
    "Config",
    "Deps",
    "Job",
    "JobError",
    "LeaseLostError",
    "NotConfiguredError",
    "NotPendingError",
    "QueueFullError",
    "RecipeError",
    "RedisSession",
    "RedisUnavailableError",
    "RunFailedError",
    "RunHandedOverError",
    "RunUnknownError",
    "Runtime",
    "Session",
    "SessionBusyError",
    "SessionConflictError",
    "SessionSaveError",
    "SessionUnknownError",
    "SteeredError",
    "TextError",
    "Worker",
    "aclose",
    "add",
    "branch_session",
    "cancel",
    "configure",
    "decide",
    "delete_session",
    "feedback",
    "is_live",
    "listen",
    "pending",
    "q",
    "run",
    "sse",
    "start",
    "steer",
    "stop",
    "submit",
]

_MODULES = {
    "checkpoints.job": ("Job",),
    "config": ("Config", "configure"),
    "control.cancellation": ("cancel",),
    "control.feedback": ("feedback",),
    "engine.registry": ("aclose",),
    "control.steering": ("steer",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "jobs.decide": ("decide", "pending"),
    "jobs.deletion": ("delete_session",),
    "jobs.recipe": ("Call",),
    "jobs.submit": ("submit",),
    "jobs.worker": ("Worker",),
    "listeners.listener": ("listen",),
    "listeners.manual": ("add", "is_live", "q", "start", "stop"),
    "listeners.sse": ("sse",),
    "runs.capability": ("AgxCapability",),
    "runs.deps": ("Deps",),
    "runs.runner": ("run",),
    "sessions.base": ("Session", "branch_session"),
    "sessions.redis_session": ("RedisSession",),
    "stream.events": ("Runtime",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
