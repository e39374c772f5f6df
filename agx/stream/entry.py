"""The codec of a session stream's entries: fields `type`, `origin` and `body`, in this order (contract, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from ..redis.entry_id import StreamId, format_id, parse_id

# `type` comes first: the append script and the clients of the older package find it there.
TYPE, ORIGIN, BODY = "type", "origin", "body"

_TYPE, _ORIGIN, _BODY = TYPE.encode(), ORIGIN.encode(), BODY.encode()


@dataclass(slots=True)
class StreamEntry:
    """An entry of a session stream: as it is sent, or as it was read. `raw_body` is the JSON as it is stored.

    Nothing of it changes, except that a writer gives a new id to an entry whose id the server has refused for good.
    One that a listener reads is shared by all listeners of the process.
    """

    id: StreamId
    type: str
    origin: str
    raw_body: bytes
    _json: str | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, entry_id: bytes, fields: Mapping[bytes, bytes] | Sequence[bytes]) -> StreamEntry:
        """Parse an entry of a reply; `fields` as redis-py gives them (a mapping) or as the server sends them (flat).

        What is not UTF-8 is replaced, a missing field is empty, other fields are ignored: an entry may be anybody's.
        """
        if not isinstance(fields, Mapping):
            fields = dict(zip(fields[::2], fields[1::2], strict=False))
        return cls(
            parse_id(entry_id.decode()),
            fields.get(_TYPE, b"").decode("utf-8", "replace"),
            fields.get(_ORIGIN, b"").decode("utf-8", "replace"),
            fields.get(_BODY, b"{}"),
        )

    @property
    def body(self) -> dict[str, Any]:
        """The body as an object, parsed at each access; a body that is not an object becomes `{"raw": text}`."""
        body = self._parse()
        return {"raw": self.raw_body.decode("utf-8", "replace")} if body is None else body

    def _parse(self) -> dict[str, Any] | None:
        try:
            body = orjson.loads(self.raw_body)
        except orjson.JSONDecodeError:
            return None
        return body if isinstance(body, dict) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the event that `listen(serialize=False)` yields."""
        return {"id": format_id(self.id), "type": self.type, "origin": self.origin, "body": self.body}

    def to_json(self) -> str:
        """Return the event that `listen()` yields: JSON on one line. Made once for all listeners."""
        if self._json is None:
            # An object is passed on as it is stored, also where it nests deeper than the encoder goes. In valid JSON a
            # line break can only stand between values, where a space means the same.
            one_line = self.raw_body.translate(_LINE_BREAKS_TO_SPACES)
            body = self.body if self._parse() is None else orjson.Fragment(one_line)
            event = {"id": format_id(self.id), "type": self.type, "origin": self.origin, "body": body}
            self._json = orjson.dumps(event).decode()
        return self._json


_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


def to_fields(type: str, origin: str, body: bytes) -> tuple[str, str, str, str, str, bytes]:
    """Return the fields of an entry as arguments of XADD."""
    return (TYPE, type, ORIGIN, origin, BODY, body)


def to_lua_fields(type: str, origin: str, body: str) -> str:
    """Return the fields of an entry as arguments of a script's XADD; each argument is a Lua expression."""
    return f"'{TYPE}', {type}, '{ORIGIN}', {origin}, '{BODY}', {body}"
