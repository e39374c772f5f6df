"""`agx demo` from start to end: server, sidecar, traffic, screen, comparison."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from rich.console import Console

from ..config import Config, configure
from ..embedded.server import EmbeddedServer
from ..engine.registry import aclose
from .comparison import Row, compare
from .finished_runs import FinishedRuns
from .scenarios import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LOST,
    ONCE,
    RESUMED,
    Scenario,
)
from .screen import Screen
from .sidecar import SidecarProcess
from .traffic import LEASE_TTL, Traffic, find_model, start_module

_AT_ONCE = 4  # runs
_FRAME = 1 / 12  # seconds
_SETTLE = 15.0  # seconds within which the sidecar must have counted all runs
_PAUSE = (0.3, 1.6)  # seconds between two arrivals of the endless traffic
_MIX = [COMPLETED] * 20 + [CANCELLED] * 5 + [FAILED] * 2 + [LOST, (RESUMED,)]


def run_demo(*, once: bool, model: str | None) -> int:
    """Run the demo; returns the exit code: 0 if the runs and the metrics agree, 1 if not, 130 if it was interrupted.

    Raises AgxError where the server, the sidecar or the model is not available.
    """
    # Some scenarios fail on purpose: each has its line, and the service's log with its traceback would hide the rest.
    logging.getLogger("agx").addHandler(logging.NullHandler())
    if model:
        find_model(model)  # before anything is started
    with EmbeddedServer() as server:
        return asyncio.run(_demo(server.url, once=once, model=model))


async def _demo(redis_url: str, *, once: bool, model: str | None) -> int:
    sidecar = SidecarProcess(redis_url)
    stop = asyncio.Event()
    finished_runs = FinishedRuns()
    try:
        with start_module("worker_process", redis_url, *([model] if model else [])) as worker:
            await sidecar.start(watched=not once)
            addresses = {"Redis": redis_url, "metrics": f"{sidecar.url}/metrics"}
            if not once:
                addresses |= {"console": sidecar.console_url, "to end": "Ctrl-C"}
            screen = Screen(Console(), finished_runs, addresses)
            traffic = Traffic(
                redis_url, model, finished_runs, on_begin=screen.add, on_end=screen.print_finished, worker=worker
            )
            async with Redis.from_url(redis_url) as client:
                configure(Config(redis=client, service_name="agx-demo", lease_ttl=LEASE_TTL))
                with _stopped_by_signals(stop):
                    await _show(screen, (_play_once if once else _play_on)(traffic, stop), stop)
        rows = await _settle(sidecar, finished_runs)
    finally:
        sidecar.stop()
    screen.compare(rows)
    if not all(row.agrees for row in rows):
        return 1
    return 130 if once and stop.is_set() else 0


async def _play_once(traffic: Traffic, stop: asyncio.Event) -> None:
    """Run a few sessions of each outcome."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def play(scenario: Scenario) -> None:
        async with slots:
            if not stop.is_set():
                await traffic.play(scenario)

    async with asyncio.TaskGroup() as group:
        for scenario in ONCE:
            group.create_task(play(scenario))


async def _play_on(traffic: Traffic, stop: asyncio.Event) -> None:
    """Run sessions of all outcomes until `stop` is set; the first one survives the loss of its process."""
    async with asyncio.TaskGroup() as group:
        scenario = RESUMED
        while not stop.is_set():
            group.create_task(traffic.play(scenario))
            scenario = random.choice(random.choice(_MIX))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(*_PAUSE)):
                    await stop.wait()


async def _show(screen: Screen, traffic: Coroutine[None, None, None], stop: asyncio.Event) -> None:
    """Draw until the traffic is over; when `stop` is set, end its runs, as a service that shuts down does."""
    playing = asyncio.create_task(traffic)
    with screen:
        while not (playing.done() or stop.is_set()):
            screen.draw()
            await asyncio.wait({playing}, timeout=_FRAME)
        await aclose()
        while not playing.done():
            # Runs of killed processes, which the sidecar has not noticed yet.
            screen.draw(ending=True)
            await asyncio.wait({playing}, timeout=_FRAME)
        await aclose()
        try:
            await playing
        except ExceptionGroup as group:
            raise group.exceptions[0] from None


async def _settle(sidecar: SidecarProcess, finished_runs: FinishedRuns) -> list[Row]:
    """Return the comparison as soon as it agrees, at the latest after `_SETTLE` seconds."""
    deadline = time.monotonic() + _SETTLE
    while True:
        rows = compare(finished_runs, await sidecar.metrics())
        if all(row.agrees for row in rows) or time.monotonic() > deadline:
            return rows
        await asyncio.sleep(0.1)


@contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` at the first Ctrl-C or SIGTERM; the second one has its usual effect."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def restore() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    def on_signal() -> None:
        restore()
        stop.set()

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        restore()
