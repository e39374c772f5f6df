"""A service's shutdown: its runs end and are saved, its event streams end, before the server gives up on them."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

from ..engine.registry import aclose, current_engine
from .event_stream import close_streams


@asynccontextmanager
async def graceful_shutdown(grace: float = 10) -> AsyncIterator[None]:
    """Keep runs safe through a shutdown: `async with graceful_shutdown():` around the `yield` of the app's lifespan.

    At SIGTERM or SIGINT live runs have `grace` seconds left, then they are cancelled (reason `shutdown`) and saved;
    event streams show their ends and are closed, so that the server, which waits for open responses, can go on.

    Args:
        grace: seconds; give the server's own limit (uvicorn's `timeout_graceful_shutdown`) some more, or none.
    """
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    def begin() -> None:
        if not ending:
            ending.append(loop.create_task(_end_streams(grace), name="agx-shutdown"))

    with _on_signal(lambda: loop.call_soon_threadsafe(begin)):
        try:
            yield
        finally:
            begin()
            await asyncio.gather(*ending)
            await aclose()


async def _end_streams(grace: float) -> None:
    await current_engine().end_runs(grace)
    close_streams()


@contextmanager
def _on_signal(begin: Callable[[], object]) -> Iterator[None]:
    """Call `begin` before the server's own handlers of SIGTERM and SIGINT, which are put back afterwards."""
    previous: dict[signal.Signals, Callable[[int, FrameType | None], object]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        begin()
        previous[signal.Signals(number)](number, frame)

    # Python takes signals in the main thread only; without a server's handler nobody would stop the process.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if callable(handler):
                previous[number] = handler
                signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
