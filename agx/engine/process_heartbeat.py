"""The heartbeat of a process: a `process` fact at intervals, while the loop has live runs or listeners."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..facts.queues import Queues
from ..facts.schema import ProcessState, Service
from ..redis.supervisor import Supervisor
from ..stream.hub import Hub
from ..stream.write_side import WriteSide

_INTERVAL = 10.0  # seconds between two `process` facts


class ProcessHeartbeat:
    """Emits the `process` facts of one engine."""

    def __init__(
        self,
        supervisor: Supervisor,
        service: Service,
        *,
        queues: Queues,
        write_side: WriteSide,
        hub: Hub,
        is_live: Callable[[], bool],
    ) -> None:
        self._supervisor = supervisor
        self._service = service
        self._queues = queues
        self._write_side = write_side
        self._hub = hub
        self._is_live = is_live
        self._task: asyncio.Task[None] | None = None
        self._count = 0
        self._emitted_gaps = self._emitted_rereads = 0  # counts in a fact are increments since the one before

    def start(self) -> None:
        """Emit a fact every ten seconds, as long as the process has a live run or a listener."""
        if self._task is None or self._task.done():
            self._task = self._supervisor.start(self._run, name="agx-process-heartbeat")

    async def _run(self) -> None:
        while self._is_live():
            await asyncio.sleep(_INTERVAL)
            self._emit()

    def flush(self) -> None:
        """Emit what has happened since the last fact; for the shutdown."""
        if self._task is not None and not self._task.done():
            self._emit()

    def _emit(self) -> None:
        self._count += 1
        hub, streams, stats = self._hub, self._write_side.streams, self._write_side.commit.stats
        self._queues.put(
            ProcessState(
                id=f"{self._service.instance}:{id(self):x}:{self._count}",
                at_ns=time.time_ns(),
                service=self._service,
                listeners=hub.listeners,
                buffered_events=streams.buffered_events,
                silence_ns=int(streams.longest_silence() * 1e9),
                gaps=hub.gaps - self._emitted_gaps,
                rereads=hub.rereads - self._emitted_rereads,
                append_counts=tuple(stats.counts),
                append_sum_ns=stats.sum_ns,
            )
        )
        self._emitted_gaps, self._emitted_rereads = hub.gaps, hub.rereads
        stats.reset()

    def close(self) -> None:
        """Stop the task."""
        if self._task is not None:
            self._task.cancel()
