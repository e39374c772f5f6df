"""Every listener is handed each event once and in order, in whatever order a server's replies and messages come.

A server, its connections and the writers are a model; the feed and its listeners are the real ones.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from agx.listeners import listener
from agx.listeners.listener import Follower
from agx.redis.entry_id import StreamId, format_id, parse_id
from agx.redis.keys import SessionKeys
from agx.redis.redis_py import Reply
from agx.stream import hub
from agx.stream.hub import Hub

STEPS = 60
_CUT = RedisConnectionError("cut")


class World:
    """One session's stream, the reading connection, the subscription, and the listeners of a process."""

    delivers_messages = True

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.session = SessionKeys.of("agx", 1, 1, "s")
        self.hub: Any = Hub(self, self, self, patience=1e9, poll_every=1e9)  # type: ignore[arg-type]
        self.stream: list[tuple[StreamId, str]] = [((1, 0), "begin")]
        self.appended = list(self.stream)
        self.lost: list[tuple[StreamId, str]] = []  # by a failover, until their writer appends them again
        self.unpublished: deque[StreamId] = deque()  # of `add()`, whose PUBLISH is a command of its own
        self.commands: deque[tuple[asyncio.Future[Reply], tuple[Any, ...]]] = deque()
        self.replies: deque[tuple[asyncio.Future[Reply], Reply]] = deque()
        self.messages: deque[bytes | None] = deque()  # None: the subscription is confirmed
        self.is_subscribed = False
        self.silent = False  # nothing announces the stream's last entry
        self.delivered: list[list[StreamId]] = []
        self.awake: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.here: list[int] = []  # the listeners that have not left
        self.trace: list[str] = []

    # --- what the hub uses

    def execute(self, *args: Any, as_sent: bool = False) -> asyncio.Future[Reply]:
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.commands.append((reply, args))
        return reply

    def subscribe(self, channel: str, on_message: Callable[[bytes], None], on_subscribed: Callable[[], None]) -> None:
        self.on_message, self.on_subscribed = on_message, on_subscribed

    def unsubscribe(self, channel: str) -> None:
        self.is_subscribed = False

    def start(self, *_: object, **__: object) -> None:
        """Start no polling: the world polls."""

    # --- steps

    def steps(self) -> dict[Callable[[], None], float]:
        """Return the steps that are possible, and how often each is taken beside the others."""
        can_append = not self.lost
        return {
            self.join: 1.0 * (len(self.here) < 3),
            self.leave: 0.2 * bool(self.here),
            self.append: 2.0 * can_append,
            self.add: 0.6,
            self.publish_added: 2.0 * bool(self.unpublished),
            self.restart: 0.2 * can_append,
            self.lose: 0.4 * (can_append and self.stream[-1][1] == "event"),
            self.restore: 0.5 * bool(self.lost),
            self.run_command: 4.0 * bool(self.commands),
            self.reply: 4.0 * bool(self.replies),
            self.fail: 0.3 * bool(self.replies),
            self.message: 4.0 * bool(self.messages),
            self.cut: 0.1 * self.is_subscribed,
            self.confirm: 4.0 * (not self.is_subscribed and bool(self.here)),
            self.pause: 0.4 * bool(self.awake),
            self.resume: 0.6 * bool(self.awake),
        }

    def join(self) -> None:
        self.here.append(len(self.tasks))
        self.delivered.append([])
        self.awake.append(asyncio.Event())
        self.awake[-1].set()
        cursor = (0, 0) if self.dice.random() < 0.7 else self.dice.choice(self.appended)[0]
        self.delivered[-1].append(cursor)
        follower = Follower(
            self.hub, self.session, cursor=cursor if cursor > (0, 0) else None,
            wait=1e9, timeout=None, idle=None, whole_session=True,
        )  # fmt: skip
        is_live = self.dice.random() < 0.5
        self.tasks.append(asyncio.create_task(self.listen(follower, self.delivered[-1], self.awake[-1], is_live)))

    async def listen(self, run: Follower, delivered: list[StreamId], awake: asyncio.Event, is_live: bool) -> None:
        with run:
            while (entries := await run.next()) is not None:
                delivered += [entry.id for entry in entries if not entry.made_here]
                await awake.wait()
                while is_live and (arrival := run.wait_entries()) is not None:
                    delivered += [entry.id for entry in run.select(await arrival or []) if not entry.made_here]
                    await awake.wait()

    def leave(self) -> None:
        """Cancel a listener at whatever it waits for."""
        self.tasks[self.here.pop(self.dice.randrange(len(self.here)))].cancel()

    def next_id(self) -> StreamId:
        return (max(self.appended)[0][0] + 1, 0)

    def append(self) -> None:
        before, new = self.stream[-1][0], []
        for _ in range(self.dice.choice([1, 1, 2, 3])):
            new.append((self.next_id(), "event"))
            self.appended.append(new[-1])
        self.publish_entries(before, new)

    def publish_entries(self, before: StreamId, new: list[tuple[StreamId, str]]) -> None:
        self.stream += new
        self.silent = False
        fields: list[str] = [str(len(new)), format_id(before)]
        for entry_id, kind in new:
            fields += [format_id(entry_id), kind, "o", "{}", "-", "-"]
        self.publish("\n".join(fields if self.dice.random() < 0.7 else [format_id(new[-1][0])]).encode())

    def add(self) -> None:
        self.stream.append((self.next_id(), "info"))
        self.appended.append(self.stream[-1])
        self.silent = self.dice.random() < 0.3  # a client of the older package sends no wake-up
        if not self.silent:
            self.unpublished.append(self.stream[-1][0])

    def publish_added(self) -> None:
        self.publish(format_id(self.unpublished.popleft()).encode())

    def publish(self, message: bytes) -> None:
        if self.is_subscribed:
            self.messages.append(message)

    def restart(self) -> None:
        self.stream, self.silent = [(self.next_id(), "begin")], False
        self.appended += self.stream
        self.publish(format_id(self.stream[0][0]).encode())

    def lose(self) -> None:
        while len(self.stream) > 1 and self.stream[-1][1] == "event" and len(self.lost) < 3:
            self.lost.insert(0, self.stream.pop())

    def restore(self) -> None:
        if self.lost[0][0] > self.stream[-1][0]:
            self.publish_entries(self.stream[-1][0], self.lost)
        else:  # somebody's `add()` came first: they get new ids
            self.appended = [entry for entry in self.appended if entry not in self.lost]
            new = []
            for _ in self.lost:
                new.append((self.next_id(), "event"))
                self.appended.append(new[-1])
            self.publish_entries(self.stream[-1][0], new)
        self.lost = []

    def run_command(self) -> None:
        reply, (verb, _, *args) = self.commands.popleft()
        result: Reply = b"live"
        if verb == "XREVRANGE":
            result = self.stream[-1:]
        elif verb == "XRANGE":
            after = (-1, 0) if args[0] == "-" else parse_id(args[0][1:])
            result = [entry for entry in self.stream if entry[0] > after][: args[3]]
        if verb != "GET":
            result = [
                [format_id(i).encode(), [b"type", kind.encode(), b"origin", b"o", b"body", b"{}"]] for i, kind in result
            ]
        self.replies.append((reply, result))

    def reply(self) -> None:
        reply, result = self.replies.popleft()
        if not reply.done():
            reply.set_result(result)

    def fail(self) -> None:
        reply, _ = self.replies.popleft()
        if not reply.done():
            reply.set_exception(_CUT)

    def message(self) -> None:
        message = self.messages.popleft()
        self.on_subscribed() if message is None else self.on_message(message)

    def cut(self) -> None:
        self.messages.clear()
        self.is_subscribed = False

    def confirm(self) -> None:
        self.is_subscribed = True
        self.messages.append(None)

    def pause(self) -> None:
        self.dice.choice(self.awake).clear()

    def resume(self) -> None:
        self.dice.choice(self.awake).set()

    # --- the end

    async def settle(self) -> None:
        """Let all that is under way arrive, with as many polls as an outage may take."""
        if not self.is_subscribed:
            self.confirm()
        await self.drain()
        if self.lost:
            self.restore()
        if self.silent:  # found with the next entry that has a wake-up
            self.append()
        for _ in range(4):
            await self.drain()
            self.hub._poll_quiet()
        await self.drain()

    async def drain(self) -> None:
        for event in self.awake:
            event.set()
        await turn()
        for _ in range(500):
            steps = self.steps()
            possible = [
                step for step in (self.publish_added, self.run_command, self.reply, self.message) if steps[step]
            ]
            if not possible:
                return
            possible[0]()
            await turn()
        raise AssertionError("it reads for ever")

    def check(self) -> None:
        for n, (first, *delivered) in enumerate(self.delivered):
            assert delivered == sorted(set(delivered)), (n, "repeats or reorders", delivered)
            last = self.appended[-1][0] if n in self.here else max(delivered, default=first)
            begin = max((i for i, kind in self.appended if kind == "begin" and i <= last), default=last)
            wanted = [i for i, _ in self.appended if first < i <= last and i >= begin]
            assert [i for i in delivered if i in wanted] == wanted, (n, "misses", first, delivered, wanted)


async def turn() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def run(seed: int) -> None:
    world = World(seed)
    try:
        for _ in range(STEPS):
            steps = world.steps()
            (step,) = world.dice.choices(list(steps), list(steps.values()))
            world.trace.append(step.__name__)
            step()
            await turn()
        await world.settle()
        world.check()
    except AssertionError as fault:
        fault.add_note(f"seed {seed}: {', '.join(world.trace)}")
        raise
    finally:
        for task in world.tasks:
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "QUEUE", 3)
    monkeypatch.setattr(hub, "READ", 3)
    monkeypatch.setattr(listener, "READ", 3)
    monkeypatch.setattr(listener, "_ASK_AGAIN", 0)


@pytest.mark.usefixtures("small")
async def test_each_event_once_and_in_order() -> None:
    for seed in range(100):
        await run(seed)
