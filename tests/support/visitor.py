"""Somebody who uses the console over plain HTTP, and runs that are made by hand for him to see."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode

import orjson
import redis

from agx.control.approvals import PendingCall
from agx.redis import keys

from .made_facts import ended
from .replica import Replica
from .waiting import wait_until_sync

TOKEN = "a-token-of-sixteen-characters-or-more"


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer."""

    status: int
    headers: dict[str, str]
    text: str

    def rows(self) -> list[str]:
        """The ids of the runs in the tables, from above."""
        return re.findall(r'<tr id="r-([^"]+)"', self.text)


def console_port(sidecar: Replica) -> int:
    """Wait until the console listens, and return its port."""
    found = wait_until_sync(lambda: re.search(r"console at http://[^ ]+:(\d+)/", sidecar.log), what="a console")
    return int(found[1])


@dataclass
class Visitor:
    """A browser without its face: keeps the cookie and sends the origin, unless told otherwise."""

    port: int
    cookie: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> Seen:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, form: dict[str, str], **headers: str) -> Seen:
        return self._ask("POST", path, urlencode(form), {"Origin": self.origin, **headers})

    def log_in(self, token: str = TOKEN) -> Seen:
        seen = self.post("/login", {"token": token})
        if "set-cookie" in seen.headers:
            self.cookie = seen.headers["set-cookie"].split(";")[0]
        return seen

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> Seen:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        cookie = {"Cookie": self.cookie} if self.cookie else {}
        try:
            connection.request(method, path, body, {**cookie, **headers})
            answer = connection.getresponse()
            text = answer.read().decode()
            return Seen(answer.status, {name.lower(): value for name, value in answer.getheaders()}, text)
        finally:
            connection.close()


OpenConsole = Callable[..., tuple[Replica, Visitor]]  # the console's mode, and environment variables by keyword


def begin_live(
    client: redis.Redis, session: keys.SessionKeys, run_id: str, *, partitions: int, agent: str = "support"
) -> None:
    """Write what a service writes when a run begins: lease, deadline, `begin`."""
    now = int(time.time() * 1_000)
    body = {"session_id": session.session, "run_id": run_id, "agent": agent, "seq": 0}
    leases = keys.leases(session.prefix, keys.partition(session.scope, partitions))
    pipeline = client.pipeline(transaction=False)
    pipeline.set(session.live, run_id, ex=600)
    pipeline.zadd(leases, {session.lease_member(run_id): now + 600_000})
    pipeline.expire(leases, 600)
    pipeline.xadd(session.stream, {"type": "begin", "origin": "opale", "body": orjson.dumps(body)})
    pipeline.expire(session.stream, 600)
    pipeline.execute()


def say(client: redis.Redis, session: keys.SessionKeys, origin: str = "pydantic-ai", **body: object) -> None:
    """Append an event to a run made by hand."""
    client.xadd(session.stream, {"type": "event", "origin": origin, "body": orjson.dumps(body)})


def leave_call(
    client: redis.Redis, session: keys.SessionKeys, call_id: str = "c1", *, partitions: int = 8, **fields: Any
) -> None:
    """Write what a service writes when a run ends with a call that waits."""
    fact = ended("run-1", scope=session.scope, user=session.user, session=session.session)
    common = {
        "id": f"run-1:decision.{call_id}",
        **{f: getattr(fact, f) for f in ("scope", "user", "session", "run_id")},
    }
    given: dict[str, Any] = {
        "scope_id": session.scope,
        "user_id": session.user,
        "session_id": session.session,
        "run_id": "run-1",
        "agent": "support",
        "call_id": call_id,
        "tool": "refund",
        "args": {"order": "7", "euros": 20},
        "kind": "approval",
        "since_ms": int(time.time() * 1_000) - 90_000,
        "recipe": "support",
        "job": {},
        "fact": {**common, "agent": fact.agent, "service": fact.service, "trace": fact.trace},
    }
    key = keys.approvals(session.prefix, keys.partition(session.scope, partitions))
    name = f"c:{session.scope}:{session.user}:{session.session}:{call_id}"
    client.hset(key, name, orjson.dumps(PendingCall(**given | fields)))
    client.expire(key, 600)
