"""Signals of a process: SIGTERM and SIGINT ask it to stop its work in order."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM or SIGINT; afterwards signals do what they did before. Main thread only."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def has_own_handler() -> bool:
    """Return whether the process handles SIGTERM itself; outside the main thread nobody can."""
    in_main = threading.current_thread() is threading.main_thread()
    return not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
