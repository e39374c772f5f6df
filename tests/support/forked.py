"""Real processes forked from one that has imported agx, pydantic-ai and the sidecar.

A start costs milliseconds, not a second of imports. The command `agx-sidecar` itself has tests of its own.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "agx.jobs.worker",
        "agx.runs.runner",
        "agx.sessions.redis_session",
        "agx.web",
        "agx_sidecar.__main__",
        "genai_prices.data",
        "opentelemetry.sdk.trace",
        "prometheus_client.parser",
        "pydantic_ai.models.function",
        "pydantic_ai.models.openai",
        "redis.asyncio",
        "sqlalchemy.dialects.sqlite.aiosqlite",
        "sqlalchemy.ext.asyncio",
        "uvicorn",
    ]
)
_PATIENCE = 10.0  # seconds until SIGKILL


class Forked:
    """A process that runs a function, in a session of its own; it ends when this process does, however that ends.

    Args:
        log: file for what it prints; None prints where this process does.
        environment: its environment variables; None inherits those of this process's first fork.
    """

    def __init__(
        self,
        work: Callable[..., object],
        *args: object,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        if log is not None:
            log.touch()
        given = None if environment is None else dict(environment)
        self._process = _CONTEXT.Process(target=_main, args=(log, given, work, args), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        """What it has printed into its log."""
        return "" if self._log is None else self._log.read_text(errors="replace")

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

    def wait(self) -> int:
        """Wait until the process ends by itself; return its exit code."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal that ends the process, wait for it, and return its exit code; SIGKILL follows in the end."""
        self.send(how)
        self._process.join(_PATIENCE)
        if not self.ended:
            self.send(signal.SIGKILL)
        return self.wait()


def _main(
    log: Path | None, environment: dict[str, str] | None, work: Callable[..., object], args: tuple[object, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.setsid()
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    if log is not None:
        with log.open("ab") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
    work(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
