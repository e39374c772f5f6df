"""The tool calls that wait for a decision or a result: one hash per partition of scopes (contract, section 3).

A field `c:{scope}:{user}:{session}:{call id}` has the call, `d:...` its decision. A decision is set once. Both stay
until the run that goes on with them is submitted, or until another run of the session begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
from pydantic import TypeAdapter, ValidationError

from ..facts.schema import ApprovalDecided, DecisionKind
from ..redis import keys
from ..redis.bus import Bus, Script
from ..redis.keys import SessionKeys

Kind = Literal["approval", "result"]

# Adds calls that are not there yet. ARGV: TTL, then field and value of each.
_ADD = Script("""
for n = 2, #ARGV, 2 do redis.call('HSETNX', KEYS[1], ARGV[n], ARGV[n + 1]) end
return redis.call('EXPIRE', KEYS[1], ARGV[1])
""")

# Sets the decision on a call. ARGV: the call's field, the decision's, the decision. Replies the one that holds, or
# nothing where the call is not there.
_DECIDE = Script("""
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return nil end
redis.call('HSETNX', KEYS[1], ARGV[2], ARGV[3])
return redis.call('HGET', KEYS[1], ARGV[2])
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What somebody has decided on a call; `key` identifies the call of `decide()`, `args` replace the model's."""

    approve: bool
    args: dict[str, Any] | None = None
    result: Any = None
    by: str | None = None
    key: str | None = None
    expired: bool = False

    @property
    def kind(self) -> DecisionKind:
        """How metrics count it."""
        return "expired" if self.expired else "approved" if self.approve else "denied"


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCall:
    """A tool call that waits.

    Args:
        kind: `approval` waits for a yes or a no, `result` for the result of a call that is made elsewhere.
        recipe: with which a worker goes on; None where only the service that ran the agent can.
        job: the arguments of that worker's job.
        since_ms: server time; `expires_ms` likewise, after which the call is denied.
        fact: what the fact of its decision has of the run.
        decision: None until somebody decides.
    """

    scope_id: str
    user_id: str
    session_id: str
    run_id: str
    agent: str
    call_id: str
    tool: str
    args: dict[str, Any]
    kind: Kind
    since_ms: int
    expires_ms: int | None = None
    recipe: str | None = None
    job: dict[str, Any]
    fact: dict[str, Any]
    decision: Decision | None = None

    @property
    def session(self) -> tuple[str, str, str]:
        return self.scope_id, self.user_id, self.session_id

    def make_fact(self, decision: Decision, now_ms: int) -> ApprovalDecided:
        """Return the fact of a decision that is made now (server time)."""
        since_ns, now_ns = min(self.since_ms, now_ms) * 1_000_000, now_ms * 1_000_000
        return ApprovalDecided(**self.fact, decision=decision.kind, start_ns=since_ns, end_ns=now_ns)


_CALL, _DECISION = TypeAdapter(PendingCall), TypeAdapter(Decision)


@dataclass(frozen=True, slots=True)
class Approvals:
    """The waiting calls of a prefix. Each method raises RedisError or OSError where Redis did not answer."""

    bus: Bus
    prefix: str
    partitions: int

    async def add(self, session: SessionKeys, calls: Iterable[PendingCall]) -> None:
        """Add the calls with which a run ended."""
        pairs = [part for call in calls for part in (_field("c", session, call.call_id), orjson.dumps(call))]
        await self.bus.run(_ADD, self._key(session.scope), keys.STATE_TTL, *pairs)

    async def decide(self, session: SessionKeys, call_id: str, decision: Decision) -> Decision | None:
        """Set the decision on a call; returns the one that holds, None where the call does not wait."""
        fields = (_field("c", session, call_id), _field("d", session, call_id))
        held = await self.bus.run(_DECIDE, self._key(session.scope), *fields, orjson.dumps(decision))
        return None if held is None else _DECISION.validate_json(held)

    async def remove(self, session: SessionKeys, call_ids: Iterable[str]) -> None:
        """Remove calls: a run goes on with them, or without them."""
        fields = [_field(kind, session, call_id) for call_id in call_ids for kind in ("c", "d")]
        await self.bus.execute("HDEL", self._key(session.scope), *fields)

    async def read(self, partition: int) -> list[PendingCall]:
        """Return the waiting calls of a partition, the oldest first."""
        flat = await self.bus.execute("HGETALL", keys.approvals(self.prefix, partition))
        found = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
        calls: list[PendingCall] = []
        for field, value in found.items():
            if field[:1] == b"c":
                decided = found.get(b"d" + field[1:])
                with contextlib.suppress(ValidationError):  # of another program, or of another version
                    decision = None if decided is None else _DECISION.validate_json(decided)
                    calls.append(replace(_CALL.validate_json(value), decision=decision))
        return sorted(calls, key=lambda call: call.since_ms)

    async def read_scope(self, scope: str) -> list[PendingCall]:
        """Return the waiting calls of a scope, the oldest first."""
        return [call for call in await self.read(keys.partition(scope, self.partitions)) if call.scope_id == scope]

    def _key(self, scope: str) -> str:
        return keys.approvals(self.prefix, keys.partition(scope, self.partitions))


def _field(kind: str, session: SessionKeys, call_id: str) -> bytes:
    return f"{kind}:{session.scope}:{session.user}:{session.session}:{call_id}".encode("utf-8", "replace")
