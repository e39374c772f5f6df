"""The sidecar and runs that another process could resume: when it waits, and how it finalizes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from redis import Redis
from support.replica import PARTITIONS, PREFIX, Queue, Replica, StartReplica
from support.waiting import wait_until_sync

from agx.facts import schema as facts
from agx.facts.decoding import decode
from agx.redis import keys
from agx.redis.live_key import MARK_GAP, gap_holder
from agx_sidecar.recovery.reaper import SWEEP

SESSION = keys.SessionKeys.of(PREFIX, "acme", "ada", "s")
TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"
BEGIN = {"session_id": "s", "run_id": "r", "traceparent": TRACEPARENT, "agent": "support", "service": "web", "seq": 0}


LEASES = keys.leases(PREFIX, keys.partition(SESSION.scope, PARTITIONS))


@pytest.fixture
def client(queue: Queue, redis_url: str) -> Iterator[Redis]:
    """A client of a server on which a service with short leases has been."""
    with Redis.from_url(redis_url, decode_responses=True) as client:
        client.hset(keys.meta(PREFIX), "lease_ttl", "0.5")
        yield client


@pytest.fixture
def sidecar(start_replica: StartReplica, client: Redis) -> Replica:
    """A sidecar that has looked for dead runs already: what it does later is not late because it had just started."""
    replica = start_replica(AGX_SINKS="metrics")
    client.zadd(LEASES, {"not a member of ours": 1})
    wait_until_sync(lambda: not client.exists(LEASES))
    return replica


def _now_ms(client: Redis) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1_000 + int(micros) // 1_000


def _die(client: Redis, *entries: dict[str, Any], **begin: object) -> int:
    """Write what a process leaves that dies now; returns the server's time."""
    client.xadd(SESSION.stream, _fields("begin", {**BEGIN, **begin}))
    for seq, entry in enumerate(entries, 1):
        body = {name: value for name, value in entry.items() if name not in ("type", "ck")}
        client.xadd(SESSION.stream, _fields(entry["type"], {"seq": seq, **body}, entry.get("ck")))
    client.expire(SESSION.stream, 600)
    died = _now_ms(client)
    client.zadd(LEASES, {SESSION.lease_member("r"): died})
    client.expire(LEASES, 600)
    return died


def _fields(type: str, body: dict[str, Any], checkpoint: str | None = None) -> dict[Any, Any]:
    fields: dict[Any, Any] = {"type": type, "origin": "opale", "body": orjson.dumps(body)}
    return fields if checkpoint is None else {**fields, "ck": checkpoint}


def _wait_for_end(client: Redis) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return the server's time of the run's end, and the bodies of `error` and `end`."""

    def find() -> list[Any] | None:
        entries: Any = client.xrange(SESSION.stream)
        return entries if entries[-1][1]["type"] == "end" else None

    entries = wait_until_sync(find)
    (_, error), (last_id, end) = entries[-2:]
    assert error["type"] == "error"
    return int(last_id.split("-")[0]), orjson.loads(error["body"]), orjson.loads(end["body"])


def _read_end(client: Redis) -> facts.RunEnded:
    n = keys.partition(SESSION.scope, PARTITIONS)

    def find() -> list[facts.RunEnded]:
        queued: Any = client.xrange(keys.queue(PREFIX, n))
        return [fact for _, fields in queued if isinstance(fact := decode(fields["fact"]), facts.RunEnded)]

    (fact,) = wait_until_sync(find)
    return fact


def test_a_run_that_can_be_resumed_is_finalized_after_its_recovery_time(client: Redis, sidecar: Replica) -> None:
    died = _die(client, recover=3, max_attempts=3)
    ended, error, end = _wait_for_end(client)
    assert ended - died >= 3_000
    assert (error["error_type"], error["code"]) == ("lost", "run_lost")
    assert end["outcome"] == "lost"
    assert not _read_end(client).attempts_exhausted


def test_a_successor_has_its_own_recovery_time(client: Redis, sidecar: Replica) -> None:
    _die(client, recover=3, max_attempts=3)
    client.xadd(SESSION.stream, _fields("resume", {"seq": 1, "run_id": "r", "attempt": 2}))
    died = _now_ms(client) + int(2 * SWEEP * 1_000)  # the sidecar has seen the first death by then
    client.zadd(LEASES, {SESSION.lease_member("r"): died})
    ended, _, _ = _wait_for_end(client)
    assert ended - died >= 3_000


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_a_run_whose_attempts_are_exhausted_is_not_waited_for(
    client: Redis, sidecar: Replica, checkpoints: int
) -> None:
    began = {"type": "event", "event": "llm-begin", "idx": 0, "ck": "{}"}
    resumes = [{"type": "resume", "run_id": "r", "attempt": n} for n in range(2, 3 + checkpoints)]
    died = _die(client, *[began] * checkpoints, *resumes, recover=600, max_attempts=2)
    ended, error, end = _wait_for_end(client)
    assert ended - died < 600_000
    assert (error["error_type"], error["code"]) == ("lost", "attempts_exhausted")
    assert (end["outcome"], end["reason"]) == ("lost", None)
    assert _read_end(client).attempts_exhausted


def test_a_cancel_after_the_death_ends_the_run_as_cancelled(client: Redis, sidecar: Replica) -> None:
    died = _die(client, recover=2, max_attempts=3)
    assert client.eval(MARK_GAP.source, 1, SESSION.live, gap_holder("r"), 60_000) == 1
    ended, error, end = _wait_for_end(client)
    assert ended - died >= 2_000
    assert error["msg"] == "canceled"
    assert (end["outcome"], end["reason"]) == ("cancelled", "cancel")
    fact = _read_end(client)
    assert (fact.outcome, fact.reason, fact.error_type) == ("cancelled", "cancel", None)
    assert died <= (fact.cancel_ms or 0) <= ended
    wait_until_sync(lambda: not client.exists(SESSION.live))
    wait_until_sync(lambda: sidecar.scrape().total("agx_cancellations_total", reason="cancel") == 1)


def test_another_run_s_mark_keeps_the_session(client: Redis, sidecar: Replica) -> None:
    """A mark of another run means that this one was replaced: its stream is left to that run."""
    _die(client, recover=0, max_attempts=3)
    client.eval(MARK_GAP.source, 1, SESSION.live, gap_holder("other"), 4_000)
    marked = _now_ms(client)
    ended, _, end = _wait_for_end(client)
    assert ended - marked >= 4_000
    assert end["outcome"] == "lost"
