"""Worker processes: each measurement has a process of its own, pinned to a core, that answers over a pipe."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import traceback
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

from . import machine

_CONTEXT = multiprocessing.get_context("spawn")
_PATIENCE = 300.0  # seconds for an answer

Work = Callable[..., Coroutine[Any, Any, Any]]


class WorkerError(Exception):
    """A worker failed; the message is its traceback."""


class Line:
    """A worker's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, value: object) -> None:
        self._connection.send(("sent", value))

    async def receive(self) -> Any:
        """Wait for the runner without holding the loop."""
        return await asyncio.get_running_loop().run_in_executor(None, self._connection.recv)


class Worker:
    """A coroutine function that runs in a process of its own: `work(line, *args)`. A context manager."""

    def __init__(self, core: int, work: Work, *args: object) -> None:
        self._ours, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_main, args=(theirs, core, work, args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def receive(self) -> Any:
        """Return what the worker sends next, or returns; raises WorkerError where it failed."""
        if not self._ours.poll(_PATIENCE):
            raise WorkerError(f"nothing was received for {_PATIENCE:.0f} s")
        kind, value = self._ours.recv()
        if kind == "failed":
            raise WorkerError(value)
        return value

    def send(self, value: object) -> None:
        self._ours.send(value)

    def join(self) -> None:
        """Wait until the process has ended."""
        self._process.join(_PATIENCE)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def measure(core: int, work: Work, *args: object) -> Any:
    """Run one worker to its end and return its answer."""
    with Worker(core, work, *args) as worker:
        return worker.receive()


def _main(connection: Connection, core: int, work: Work, args: tuple[object, ...]) -> None:
    machine.pin(core)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        connection.send(("returned", asyncio.run(work(Line(connection), *args))))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
