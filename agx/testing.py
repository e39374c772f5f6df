"""For users' own tests: a real server, a session kept in memory, and a run's events gathered (contract, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .embedded.server import EmbeddedServer
from .listeners.listener import listen
from .redis.keys import Id
from .sessions.base import Session

__all__ = ["MemorySession", "collect", "embedded_redis"]


@contextmanager
def embedded_redis() -> Iterator[str]:
    """Give the URL of a Valkey or Redis of the test's own, which keeps nothing and ends with the `with` block.

    Raises:
        AgxError: there is no server's binary; the message names where to get one.
    """
    with EmbeddedServer() as server:
        yield server.url


@dataclass
class MemorySession(Session):
    """A session whose conversation is kept in a dict.

    Args:
        id: its place in `store`.
        store: where it is kept; give the same one to the next turn's session.
    """

    id: str
    store: dict[str, bytes] = field(default_factory=dict)

    async def load(self) -> None:
        if data := self.store.get(self.id):
            self.msgs_from_json(data)

    async def save(self) -> None:
        self.store[self.id] = self.msgs_to_json()


async def collect(
    scope_id: Id, user_id: Id, session_id: Id, *, after: str | None = None, timeout: float = 30
) -> list[dict[str, Any]]:
    """Return a run's events, as `listen(serialize=False)` gives them, up to and including its `end`.

    Args:
        after: id of the last event seen; goes on behind it.
        timeout: seconds without an event after which it gives up.

    Raises:
        TimeoutError: the run did not end in time.
    """
    events = [
        event async for event in listen(scope_id, user_id, session_id, after=after, timeout=timeout, serialize=False)
    ]
    if not events or events[-1]["type"] != "end":
        raise TimeoutError(f"session {session_id!r} was silent for {timeout} s before its end")
    return events
