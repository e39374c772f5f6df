"""B1, B2: a run's process and a recovery, in every order of their steps, and the same steps on a real server."""

from __future__ import annotations

import random
from typing import Any

import pytest
import redis

from agx.redis.bus import Script
from agx.redis.entry_id import parse_id
from agx.redis.keys import SessionKeys, leases
from agx.redis.live_key import ACQUIRE, CLAIM, RELEASE, RENEW
from agx.stream.append_scripts import APPEND, BEGIN, FINALIZE
from agx.stream.entry import RUNTIME, StreamEntry, to_arguments
from agx_sidecar.recovery.reaper import REMOVE

from .lost_run_model import Budget, Model, Op, Rules, Server, State, explore

WALKS = 150
NEVER_LATE = 2**53  # ms


@pytest.mark.parametrize(
    "budget",
    [
        Budget(expiries=1, replies=1, deaths=0, crashes=1),
        Budget(expiries=2, replies=0, deaths=1, crashes=0),
        Budget(expiries=2, replies=0, deaths=0, crashes=1),
        Budget(expiries=1, replies=0, deaths=1, crashes=1),
    ],
)
def test_every_order_ends_once_and_counts_once(budget: Budget) -> None:
    states, wrong, trace = explore(Rules(), budget)
    assert wrong is None, "\n".join([wrong or "", *trace])
    assert states > 20_000  # it did explore


@pytest.mark.parametrize(
    ("rules", "wrong"),
    [
        (Rules(claim_is_undecided=False), "given up though nobody had replaced it"),
        (Rules(fenced_keeps_deadline=False), "its deadline was removed before its fact was queued"),
        (Rules(own_end_decides=False), "the caller was told something else than the stream says"),
        (Rules(waits_for_begin=False), "a fact says something else than the stream"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_each_rule_is_needed(rules: Rules, wrong: str) -> None:
    """Without it the model has a counterexample, so the model can find one."""
    _, found, trace = explore(rules, Budget(expiries=2, replies=0, deaths=0, crashes=0))
    assert found == wrong
    assert trace


_IDS = {"b": "1-0", "x": "2-0", "e": "3-0", "2": "9000000000000-0"}
_TYPES = {"b": "begin", "x": "event", "e": "end", "2": "begin"}
_HOLDERS = {"R": "run", "2": "other", "C": "reaper:x"}


def _entry(letter: str) -> tuple[str | bytes, ...]:
    """Return an entry's id and parts as the scripts take them."""
    entry = StreamEntry(parse_id(_IDS[letter]), _TYPES[letter], RUNTIME, b"{}")
    return _IDS[letter], *to_arguments(entry)


class RealServer:
    """Executes the model's commands on a real server, with the scripts of the product."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.session = SessionKeys.of("agx", 1, 1, "s")
        self.leases = leases("agx", 0)
        client.delete(self.session.live, self.session.stream, self.leases, "agx::queue:0")
        self._script(ACQUIRE, self.session.live, "run", 60_000)
        client.zadd(self.leases, {"run": 1})
        self._script(BEGIN, self.session.stream, "wake", 60, "", NEVER_LATE, *_entry("b"))

    def _script(self, script: Script, key: str, *args: Any) -> Any:
        return self.client.eval(script.source, 1, key, *args)

    def apply(self, op: Op) -> Any:
        """Execute a command and return its reply in the model's words."""
        name, *args = op
        live, stream = self.session.live, self.session.stream
        match name:
            case "acquire":
                taken, value = self._script(ACQUIRE, live, _HOLDERS[args[0]], 60_000)
                return True if taken else self._named(value)
            case "renew":
                return self._named(self._script(RENEW, live, _HOLDERS[args[0]], 60_000))
            case "read_live":
                return self._named(self.client.get(live))
            case "release":
                return bool(self._script(RELEASE, live, _HOLDERS[args[0]]))
            case "claim":
                return bool(self._script(CLAIM, live, _HOLDERS["C"], 60_000))
            case "expire":
                return self.client.delete(live) and None
            case "append":
                behind, entry = args
                reply = self._script(APPEND, stream, _IDS[behind], "wake", 1_000, 60, *_entry(entry))
                return "ok" if isinstance(reply, int) else reply.decode()
            case "begin_other":
                return self._script(BEGIN, stream, "wake", 60, self._last_id, NEVER_LATE, *_entry("2")).decode()
            case "end_lost":
                return bool(self._script(FINALIZE, stream, _IDS[args[0]], "{}", "{}", 60, "wake"))
            case "read_stream":
                return self.stream
            case "add_fact":
                self.client.xadd("agx::queue:0", {"fact": args[0]})
                self.client.expire("agx::queue:0", 60)
                return None
            case "read_facts":
                return bool(self.client.xlen("agx::queue:0"))
            case "announce":
                self.client.zadd(self.leases, {"run": 1 if self.client.zscore(self.leases, "run") != 1 else 2})
                return None
            case "remove":
                if args[0] is None:
                    self.client.zrem(self.leases, "run")
                else:
                    self.client.eval(REMOVE, 1, self.leases, "run", args[0])
                return None
        raise AssertionError(op)

    def _named(self, value: bytes | None) -> str | None:
        return next((name for name, holder in _HOLDERS.items() if value == holder.encode()), None)

    @property
    def _last_id(self) -> bytes:
        """The id of the stream's last entry; empty without one."""
        return next((entry_id for entry_id, _ in self.client.xrevrange(self.session.stream, count=1)), b"")

    @property
    def stream(self) -> str:
        """The stream in the model's letters."""
        letters = {entry_id.encode(): letter for letter, entry_id in _IDS.items()}
        entries = self.client.xrange(self.session.stream)
        return "".join(letters.get(entry_id, "l") for entry_id, fields in entries if fields[b"type"] != b"error")

    @property
    def seen(self) -> Server:
        """What the server holds, in the model's words; of the facts only whether there are any."""
        deadline = int(self.client.zscore(self.leases, "run") or 0)
        return Server(self._named(self.client.get(self.session.live)), self.stream, str(self._has_facts), deadline)

    @property
    def _has_facts(self) -> bool:
        return bool(self.client.xlen("agx::queue:0"))


@pytest.mark.parametrize("first", range(0, WALKS, 50))
def test_the_real_scripts_do_what_the_model_says(first: int, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        done: set[str] = set()
        for seed in range(first, first + 50):
            done |= _walk(client, random.Random(seed))
        client.delete(leases("agx", 0))
    assert {"acquire", "renew", "release", "claim", "append", "begin_other", "end_lost", "remove"} <= done


def _walk(client: redis.Redis, chance: random.Random) -> set[str]:
    model, state, real = Model(Rules()), State(budget=Budget(3, 2, 1, 2)), RealServer(client)
    expected, done = Server(), set()
    for _ in range(60):
        steps = list(model.steps(state))
        if not steps:
            break
        step = chance.choice(steps)
        for op in step.ops:
            expected, reply = expected.apply(op)
            assert real.apply(op) == reply, (step.name, op)
            assert real.seen == expected._replace(facts=str(bool(expected.facts))), (step.name, op)
            done.add(op[0])
        state = step.state
        assert state.server == expected, step.name
    return done
