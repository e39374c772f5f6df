"""agx runs pydantic-ai agents for a service: followed, replayed, resumed, cancelled and measured from any process."""

from .canceller import cancel
from .capability import AgxCapability
from .config import Config, configure
from .deps import Deps
from .engine import aclose
from .errors import (
    AgxCanceledError,
    AgxError,
    BodyError,
    LeaseLostError,
    NotConfiguredError,
    RedisUnavailableError,
    RunFailedError,
    SessionBusyError,
    SessionConflictError,
    SessionSaveError,
)
from .events import Runtime
from .listener import listen
from .redis_session import RedisSession
from .runner import run
from .session import Session
from .sse import sse
from .stream import add, is_live, q, start, stop

__version__ = "0.2.0"

__all__ = [
    "AgxCanceledError",
    "AgxCapability",
    "AgxError",
    "BodyError",
    "Config",
    "Deps",
    "LeaseLostError",
    "NotConfiguredError",
    "RedisSession",
    "RedisUnavailableError",
    "RunFailedError",
    "Runtime",
    "Session",
    "SessionBusyError",
    "SessionConflictError",
    "SessionSaveError",
    "aclose",
    "add",
    "cancel",
    "configure",
    "is_live",
    "listen",
    "q",
    "run",
    "sse",
    "start",
    "stop",
]
