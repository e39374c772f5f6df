"""The reader of the scope queues. In: a function that sends a command. Out: pages of entries, each with its fact.

The service, the sidecar and the console read the queues `{prefix}::queue:{n}` with it (contract, section 4).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Self

import orjson

from .schema import FIELD, Fact

# `Bus.execute` and the sidecar's `Link.call` are two.
Call = Callable[..., Awaitable[Any]]

PAGE = 1_000  # entries a read

_FIELD = FIELD.encode()


class QueueEntry(NamedTuple):
    """An entry of a scope queue. Its payload is parsed only on request: that costs 100 times a search in the bytes."""

    id: str
    payload: bytes  # a fact as JSON; empty where the entry has no such field

    @property
    def fact(self) -> Fact | None:
        """The fact; None where the payload is malformed or newer than this version.

        `decoding.decode()` distinguishes the two.
        """
        from .decoding import MalformedFactError, UnknownFactError, decode  # noqa: PLC0415 - loads pydantic

        try:
            return decode(self.payload)
        except (UnknownFactError, MalformedFactError):
            return None

    @property
    def fact_key(self) -> str | None:
        """The fact's `key`, also of a newer format; None where there is none."""
        try:
            raw = orjson.loads(self.payload)
        except orjson.JSONDecodeError:
            return None
        fact_id = raw.get("id") if isinstance(raw, dict) else None
        if not isinstance(fact_id, str):
            return None
        return f"{raw['scope']}:{raw.get('user')}:{raw.get('session')}:{fact_id}" if "scope" in raw else fact_id


def parse_entries(reply: Any) -> list[QueueEntry]:
    """Return the entries of a reply, with fields as redis-py gives them (a mapping) or as the server sends them."""
    return [QueueEntry(entry_id.decode(), _payload(fields)) for entry_id, fields in reply or ()]


def _payload(fields: Any) -> bytes:
    if not isinstance(fields, Mapping):
        flat = fields or ()  # an entry that was trimmed before it was claimed has none
        fields = dict(zip(flat[::2], flat[1::2], strict=False))
    payload: bytes = fields.get(_FIELD, b"")
    return payload


async def read_page(
    call: Call, key: str, *, start: str | None = None, newest_first: bool = False, count: int = PAGE
) -> list[QueueEntry]:
    """Return up to `count` entries of a queue, from an id on, or with `newest_first` backwards from it.

    Args:
        call: sends one command and returns its reply.
        start: an id, `(id` to leave that one out, or None for the queue's beginning (or its newest entry).

    Raises:
        RedisError, OSError: whatever `call` raises.
    """
    if newest_first:
        return parse_entries(await call("XREVRANGE", key, start or "+", "-", "COUNT", count))
    return parse_entries(await call("XRANGE", key, start or "-", "+", "COUNT", count))


class QueuePages:
    """The pages of a queue, one after the other; arguments as for `read_page()`. No page is empty.

    An iterator and no generator, so that a reader may stop early and leave nothing to be closed.
    """

    def __init__(
        self, call: Call, key: str, *, start: str | None = None, newest_first: bool = False, count: int = PAGE
    ) -> None:
        self._call = call
        self._key = key
        self._start = start
        self._newest_first = newest_first
        self._count = count
        self._at_end = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[QueueEntry]:
        if self._at_end:
            raise StopAsyncIteration
        page = await read_page(
            self._call, self._key, start=self._start, newest_first=self._newest_first, count=self._count
        )
        if not page:
            raise StopAsyncIteration
        self._start = f"({page[-1].id}"
        self._at_end = len(page) < self._count
        return page
