"""`on_busy`: what a new run does where its session has a live one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar, get_args

from redis.exceptions import RedisError

from ..engine.engine import Engine
from ..errors import JobError, QueueFullError, SessionBusyError, SteeredError
from ..redis.keys import SessionKeys
from .cancellation import cancel
from .steering import send_message

T = TypeVar("T")

OnBusy = Literal["reject", "enqueue", "interrupt", "steer"]
MAX_QUEUED = 20  # runs of a session that wait
_POLL = 0.05  # seconds between two looks whether the session is free


def check_on_busy(word: object) -> None:
    """Raise JobError for a word that is none of `OnBusy`."""
    if word not in get_args(OnBusy):
        raise JobError(f"on_busy must be one of {', '.join(get_args(OnBusy))}, not {word!r:.40}")


async def stop_or_steer(session: SessionKeys, on_busy: OnBusy, prompt: object, *, key: str | None = None) -> str | None:
    """Cancel the live run, or give it the prompt; returns the id of the run that has the prompt by now."""
    if on_busy == "interrupt":
        await cancel(session.scope, session.user, session.session)
    if on_busy == "steer" and isinstance(prompt, str):
        return await send_message(session, prompt, key)
    return None


async def open_when_free(
    engine: Engine, session: SessionKeys, on_busy: OnBusy, prompt: object, open_run: Callable[[], Awaitable[T]]
) -> T:
    """Open a run at once, or once its session is free. Runs of one event loop that wait begin in order.

    A run that interrupts another, or whose prompt the live run can't take, comes before those that wait.

    Raises:
        QueueFullError: 20 runs wait for the session already.
        SessionBusyError: the session has a live run, and `on_busy` is `reject` or the service shuts down.
        SteeredError: the live run has the prompt.
        Exception: what `open_run` raises.
    """
    if on_busy == "reject":
        return await open_run()
    line, place = engine.lines.setdefault(session.stream, []), object()
    if len(line) >= MAX_QUEUED:
        raise QueueFullError(f"session {session.session!r}", f"{MAX_QUEUED} runs")
    line.insert(len(line) if on_busy == "enqueue" else 0, place)
    try:
        if (run_id := await stop_or_steer(session, on_busy, prompt)) is not None:
            raise SteeredError(run_id)
        while True:
            if engine.is_ending:
                raise SessionBusyError(session.session)
            if line[0] is place and not await _is_busy(engine, session):
                with contextlib.suppress(SessionBusyError):
                    return await open_run()
            await asyncio.sleep(_POLL)
    finally:
        line.remove(place)
        if not line:
            engine.lines.pop(session.stream, None)


async def _is_busy(engine: Engine, session: SessionKeys) -> bool:
    """Return whether a run holds the session, or can be resumed; True while Redis does not answer."""
    try:
        return bool(await engine.control.execute("EXISTS", session.live)) or await engine.is_recoverable(session)
    except (RedisError, OSError):
        return True
