"""Worker processes forked from one that has imported agx and pydantic-ai: a start costs milliseconds, not seconds."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "agx.jobs.worker",
        "agx.runs.runner",
        "agx.sessions.redis_session",
        "genai_prices.data",
        "pydantic_ai.models.function",
        "redis.asyncio",
    ]
)
_PATIENCE = 10.0  # seconds until SIGKILL


class Forked:
    """A process that runs a function.

    Args:
        log: file for what it prints; None prints where this process does.
    """

    def __init__(self, work: Callable[..., object], *args: object, log: Path | None = None) -> None:
        self._process = _CONTEXT.Process(target=_main, args=(log, work, args), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    @property
    def was_killed(self) -> bool:
        return self._process.exitcode == -signal.SIGKILL

    def send(self, how: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal that ends the process and wait for it; SIGKILL follows in the end."""
        self.send(how)
        self._process.join(_PATIENCE)
        if not self.ended:
            self.send(signal.SIGKILL)
            self._process.join()


def end_with_parent() -> None:
    """Have this process, whose event loop runs, end when the process that forked it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    asyncio.get_running_loop().add_reader(parent.sentinel, os._exit, 1)


def _main(log: Path | None, work: Callable[..., object], args: tuple[object, ...]) -> None:
    if log is not None:
        with log.open("ab") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
    work(*args)
