"""A takeover in every order of the steps of two attempts, the sidecar and a cancel, and the same on a real server."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import pytest
import redis

from agx.redis.bus import Script
from agx.redis.entry_id import format_id, parse_id
from agx.redis.keys import SessionKeys
from agx.redis.live_key import (
    ACQUIRE,
    CLAIM,
    HAND_OVER,
    MARK_CANCELLED,
    MARK_GAP,
    RELEASE,
    TAKE_OVER,
    gap_holder,
    parse_live,
)
from agx.stream.append_scripts import APPEND, BEGIN, FINALIZE, RESUME
from agx.stream.entry import RUNTIME, StreamEntry, to_arguments

from .takeover_model import ENDS, Model, Op, Rules, Server, State, explore

_RUN = "run"
_NEVER_LATE = 2**53  # ms
_HOLDERS = {"R": "run~1.a", "S": "run~2.b", "C": "reaper:x"}
_NAMES = {holder: name for name, holder in _HOLDERS.items()}


def test_every_order_of_a_takeover_ends_once() -> None:
    states, wrong, trace = explore(Rules())
    assert wrong is None, "\n".join([wrong or "", *trace])
    assert states > 3_000  # it did explore


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules)])
def test_each_rule_of_a_takeover_is_needed(rule: str) -> None:
    _, wrong, trace = explore(Rules(**{rule: False}))
    assert wrong is not None
    assert trace


class RealServer:
    """Executes the model's commands with the scripts of the product."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.session = SessionKeys.of("agx", 1, 1, "takeover")
        self.letters: dict[str, str] = {}  # by entry id
        client.delete(self.session.live, self.session.stream)
        self._script(ACQUIRE, self.session.live, _HOLDERS["R"], 60_000)
        self._script(BEGIN, self.session.stream, "wake", 60, "", _NEVER_LATE, *self._entry("b", "begin"))

    def _script(self, script: Script, key: str, *args: Any) -> Any:
        return self.client.eval(script.source, 1, key, *args)

    def _entry(self, letter: str, kind: str) -> tuple[str | bytes, ...]:
        """Return a new entry as the scripts take it: its id is above that of the stream's last entry."""
        ms, seq = parse_id(max(self.letters, key=parse_id, default="1-0"))
        entry = StreamEntry((ms, seq + 1), kind, RUNTIME, b"{}")
        self.letters[format_id(entry.id)] = letter
        return format_id(entry.id), *to_arguments(entry)

    def _id(self, letter: str) -> str:
        return next(entry_id for entry_id, known in self.letters.items() if known == letter)

    def apply(self, op: Op) -> Any:
        """Execute a command and return its reply in the model's words."""
        name, *args = op
        live, stream = self.session.live, self.session.stream
        match name:
            case "read_live":
                return self.live
            case "acquire":
                return bool(self._script(ACQUIRE, live, _HOLDERS[args[0]], 60_000)[0])
            case "take_over":
                return bool(self._script(TAKE_OVER, live, _HOLDERS[args[0]], 60_000, _RUN)[0])
            case "release":
                return bool(self._script(RELEASE, live, _HOLDERS[args[0]]))
            case "hand_over":
                return bool(self._script(HAND_OVER, live, _HOLDERS[args[0]], gap_holder(_RUN), 60_000))
            case "mark":
                return self._script(MARK_CANCELLED, live, "cancel").decode()
            case "mark_gap":
                return bool(self._script(MARK_GAP, live, gap_holder(_RUN), 60_000))
            case "claim":
                return bool(self._script(CLAIM, live, _HOLDERS["C"], 60_000))
            case "expire":
                return self.client.delete(live) and None
            case "append":
                kind = "end" if args[1] in ENDS else "event"
                return self._append(APPEND, self._id(args[0]), "wake", 1_000, 60, letter=args[1], kind=kind)
            case "resume":
                return self._append(RESUME, "wake", 60, self._id(args[0]), letter="r", kind="resume")
            case "finalize":
                done = bool(self._script(FINALIZE, stream, self._id(args[0]), "{}", "{}", 60, "wake"))
                if done:
                    (last, _), *_ = self.client.xrevrange(stream, count=1)
                    self.letters[last.decode()] = args[1]
                return done
        raise AssertionError(op)

    def _append(self, script: Script, *args: Any, letter: str, kind: str) -> str:
        entry = self._entry(letter, kind)
        raw = self._script(script, self.session.stream, *args, *entry)
        reply = "ok" if isinstance(raw, int) else str(raw, "ascii")
        if reply != "ok":
            del self.letters[str(entry[0])]
        return reply

    @property
    def live(self) -> str | None:
        held = self.client.get(self.session.live)
        if held is None:
            return None
        value = parse_live(held)
        if value.is_gap_mark:
            return "G"
        return "C" if value.holder is None else _NAMES[value.holder] + "!" * (value.kind == "cancelled")

    @property
    def seen(self) -> Server:
        entries = self.client.xrange(self.session.stream)
        letters = (self.letters[entry_id.decode()] for entry_id, parts in entries if parts[b"type"] != b"error")
        return Server(self.live, "".join(letters))


def test_the_real_scripts_take_over_as_the_model_says(redis_url: str) -> None:
    done: set[str] = set()
    with redis.Redis.from_url(redis_url) as client:
        for seed in range(150):
            done |= _walk(client, random.Random(seed))
    expected = {"acquire", "take_over", "resume", "append", "release", "hand_over", "mark", "mark_gap", "claim"}
    assert expected | {"finalize", "expire"} <= done


def _walk(client: redis.Redis, chance: random.Random) -> set[str]:
    rules = Rules()
    model, state, real = Model(rules), State(expiries=3, deaths=2), RealServer(client)
    expected, done = Server(), set()
    for _ in range(60):
        steps = [step for step in model.steps(state) if step.state != state]
        if not steps:
            break
        step = chance.choice(steps)
        for op in step.ops:
            for _ in range(1 + (op[0] == "take_over")):  # it is sent again where its reply was lost
                expected, reply = expected.apply(op, rules)
                assert real.apply(op) == reply, (step.name, op)
                assert real.seen == expected, (step.name, op)
            done.add(op[0])
        state = step.state
        assert state.server == expected, step.name
    return done
