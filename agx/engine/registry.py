"""The engines of a process: one for each running event loop and configuration."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref

from ..config import current_config
from .engine import Engine

_engines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[Engine]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_of_parent: list[object] = []


def current_engine() -> Engine:
    """Return the running loop's engine for the current configuration; raises NotConfiguredError."""
    config = current_config()
    loop = asyncio.get_running_loop()
    with _lock:
        engines = _engines.setdefault(loop, [])
        for engine in engines:
            if engine.config is config:
                return engine
        engine = Engine(config, on_closed=_remove)
        engines.append(engine)
        return engine


def _remove(engine: Engine) -> None:
    with _lock:
        for engines in _engines.values():
            if engine in engines:
                engines.remove(engine)


async def aclose(grace: float = 0) -> None:
    """End the running event loop's runs and close its connections; for the service's shutdown.

    Cancelled runs are saved and their streams ended. A later call of agx opens new connections.

    Args:
        grace: seconds that live runs have left; then they are cancelled with reason `shutdown`.
    """
    with _lock:
        engines = _engines.pop(asyncio.get_running_loop(), [])
    for engine in engines:
        await engine.aclose(grace)


def _leave_to_parent() -> None:
    # The reference stays: the sockets are shared, and the garbage collector would close what the parent uses.
    _of_parent.append(dict(_engines))
    _engines.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
