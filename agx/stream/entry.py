"""The codec of a session stream's entries: fields `type`, `origin` and `body`, in this order (contract, section 4).

A run numbers its entries: the body has the number as `seq`. Where the body is a user's (`add()`, `add_info()`,
`add_error()`) and could be taken for the runtime's own, it stays as it is, and the entry has a fourth field `seq`: with
the number, or empty where the entry was added from another process and has none.

An entry of a run that can be resumed may have a field `ck`, its checkpoint (`agx.checkpoints`). No listener gets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from ..facts.json_values import compact
from ..redis.entry_id import StreamId, format_id, parse_id

Body = dict[str, Any]
# When an entry is sent. now: at once. soon: with the next group commit. later: with the session's next entry that is
# sent now or soon, at the latest after 0.1 s.
When = Literal["now", "soon", "later"]

# `type` comes first: the append script and the clients of the older package find it there.
TYPE, ORIGIN, BODY, SEQ, CHECKPOINT = "type", "origin", "body", "seq", "ck"

# Values of `origin`.
RUNTIME = "opale"  # of begin, end and the runtime's own errors and infos
AGENT = "pydantic-ai"  # of what the model and the tools do
SUB_AGENT = "sub-agent"  # of the same, for an agent that runs in one of these tools
DEFERRED = "deferred"  # of an `info` that names the calls which the agent leaves to others
PROMPT = "prompt"  # of an `info` with the prompt of a run that a router started

DELETED = b'{"deleted":true}'  # the body of the one `end` that the stream of a deleted session has

_TYPE, _ORIGIN, _BODY, _SEQ, _CHECKPOINT = (name.encode() for name in (TYPE, ORIGIN, BODY, SEQ, CHECKPOINT))
_NAMES = [_TYPE, _ORIGIN, _BODY]


def has_visible_text(body: Mapping[str, Any]) -> bool:
    """Whether the body of an event has text of an answer, which a listener shows; thinking is none."""
    return body.get("part_kind") == "text" and bool(body.get("content_delta") or body.get("content"))


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
    own_seq: bytes | None = None  # the entry's own field `seq`; None where it has none, which is the rule
    checkpoint: bytes | None = None
    made_here: bool = False  # by a listener, of what it found; it is not on the stream
    _frame: bytes | None = field(default=None, init=False, repr=False, compare=False)
    _json: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, entry_id: bytes, fields: Mapping[bytes, bytes] | Sequence[bytes]) -> StreamEntry:
        """Parse an entry of a reply; `fields` as redis-py gives them (a mapping) or as the server sends them (flat).

        What is not UTF-8 is replaced, a missing field is empty, other fields are ignored: an entry may be anybody's.
        """
        if isinstance(fields, list) and fields[::2] == _NAMES:  # the usual case; a dict would double the time
            kind, origin, body = fields[1::2]
            return cls(
                parse_id(entry_id.decode()), kind.decode("utf-8", "replace"), origin.decode("utf-8", "replace"), body
            )
        if not isinstance(fields, (dict, Mapping)):  # the check against an ABC alone is slow
            fields = dict(zip(fields[::2], fields[1::2], strict=False))
        return cls(
            parse_id(entry_id.decode()),
            fields.get(_TYPE, b"").decode("utf-8", "replace"),
            fields.get(_ORIGIN, b"").decode("utf-8", "replace"),
            fields.get(_BODY, b"{}"),
            fields.get(_SEQ),
            fields.get(_CHECKPOINT),
        )

    @classmethod
    def of_arguments(cls, arguments: Sequence[bytes]) -> StreamEntry:
        """Return the entry with this id and the parts that `to_arguments()` has made of it."""
        entry_id, kind, origin, raw_body, own_seq, checkpoint = arguments
        return cls(
            parse_id(entry_id.decode()),
            kind.decode("utf-8", "replace"),
            origin.decode("utf-8", "replace"),
            raw_body,
            None if own_seq == _ABSENT else own_seq,
            None if checkpoint == _ABSENT else checkpoint,
        )

    @property
    def size(self) -> int:
        """Bytes of the body and of the checkpoint."""
        return len(self.raw_body) + len(self.checkpoint or b"")

    @property
    def is_users(self) -> bool:
        """Whether the body is a user's that only looks like one of the runtime's: nothing in it is read."""
        return self.own_seq is not None

    @property
    def is_from_sub_agent(self) -> bool:
        """Whether it is an event of a sub-agent, and so no part of the run's own answer, messages or usage."""
        return self.origin == SUB_AGENT

    @property
    def seq(self) -> int | None:
        """The number that the run gave the entry; None for an entry of others."""
        if self.own_seq is not None:
            return int(self.own_seq) if self.own_seq.isdigit() and len(self.own_seq) < _SEQ_DIGITS else None
        seq = self.body.get(SEQ)
        return seq if isinstance(seq, int) and not isinstance(seq, bool) and 0 <= seq < 10**_SEQ_DIGITS else None

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
        """Return the event that `listen()` yields: JSON on one line. Encoded once for all listeners."""
        if self._json is None:
            self._json = compact(self._dump(format_id(self.id)))
        return self._json.decode()

    def to_frame(self) -> bytes:
        """Return the frame that `sse()` yields. Encoded once for all listeners."""
        if self._frame is None:
            own_id = format_id(self.id)
            # After the info that a run was replaced, an EventSource has to go on with the first event of the next run.
            # With the old id it would receive the same info again.
            replaced = self.made_here and "superseded_by" in self.body
            cursor = _FROM_THE_START if replaced else own_id.encode()
            self._frame = b"id: %b\ndata: %b\n\n" % (cursor, self._dump(own_id))
        return self._frame

    def _dump(self, own_id: str) -> bytes:
        # An object is passed on as it is stored, also where it nests deeper than the encoder goes. In valid JSON a
        # line break can only stand between values, where a space means the same.
        one_line = self.raw_body.translate(_LINE_BREAKS_TO_SPACES)
        body = self.body if self._parse() is None else orjson.Fragment(one_line)
        return orjson.dumps({"id": own_id, "type": self.type, "origin": self.origin, "body": body})


_SEQ_DIGITS = 15
_FROM_THE_START = b"0"
_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


def to_fields(type: str, origin: str, body: bytes, own_seq: bytes | None = None) -> tuple[str | bytes, ...]:
    """Return the fields of an entry as arguments of XADD."""
    fields = (TYPE, type, ORIGIN, origin, BODY, body)
    return fields if own_seq is None else (*fields, SEQ, own_seq)


def to_lua_fields(type: str, origin: str, body: str) -> str:
    """Return the fields of an entry as arguments of a script's XADD; each argument is a Lua expression."""
    return f"'{TYPE}', {type}, '{ORIGIN}', {origin}, '{BODY}', {body}"


ARGUMENTS = 6  # of a script, for one entry: its id and its parts
_ABSENT = b"-"  # stands for an absent `seq` or `ck`

# In Lua: the fields of the entry whose parts are ARGV[i] to ARGV[i+4].
LUA_FIELDS = f"""
local function fields_at(i)
  local fields = {{{to_lua_fields("ARGV[i]", "ARGV[i+1]", "ARGV[i+2]")}}}
  for n, name in ipairs({{'{SEQ}', '{CHECKPOINT}'}}) do
    local value = ARGV[i + 2 + n]
    if value ~= '{_ABSENT.decode()}' then
      fields[#fields + 1] = name
      fields[#fields + 1] = value
    end
  end
  return fields
end
"""


def to_arguments(entry: StreamEntry) -> tuple[str | bytes, ...]:
    """Return an entry's parts as the arguments that `LUA_FIELDS` reads."""
    own_seq, checkpoint = entry.own_seq, entry.checkpoint
    return (
        entry.type,
        entry.origin,
        entry.raw_body,
        _ABSENT if own_seq is None else own_seq,
        _ABSENT if checkpoint is None else checkpoint,
    )
