"""What runs and deliveries cost, in counts that do not depend on the machine: commands, bytes, calls, objects."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from pydantic_ai import Agent
from redis.asyncio import Redis
from starlette.types import Message
from support.agents import Gate, ScopeDeps, scripted
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.listeners.sse import LiveFrames, event_chunks
from agx.sessions.lost_answer import read_lost_answer
from agx.stream import hub
from agx.testing import MemorySession
from agx.web.event_stream import EventStreamResponse

_PACKAGE = str(Path(agx.__file__).parent)


class Calls(Counter[str]):
    """Counts the calls of the package's functions in a block, each resumption of a coroutine as one.

    Given another path, those of the files below it.
    """

    def __init__(self, path: str = _PACKAGE) -> None:
        super().__init__()
        self.path = path

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, what: str, argument: object) -> None:
        if what == "call" and frame.f_code.co_filename.startswith(self.path):
            self[frame.f_code.co_qualname] += 1


async def commands(client: Redis) -> Counter[str]:
    """Return how often each command was called, by scripts too."""
    stats = await client.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()})


class Bytes(NamedTuple):
    """Bytes that a server has received and sent."""

    received: int
    sent: int

    def __sub__(self, before: Bytes) -> Bytes:
        return Bytes(self.received - before.received, self.sent - before.sent)


async def network(client: Redis) -> Bytes:
    stats = await client.info("stats")
    return Bytes(stats["total_net_input_bytes"], stats["total_net_output_bytes"])


async def _until_done(work: Awaitable[object]) -> None:
    await work


async def run_once(session: str) -> None:
    agent: Agent[ScopeDeps, str] = Agent(scripted(["one", " two"]), deps_type=ScopeDeps)
    await agx.run(MemorySession(id=session), agent, "hi", deps=ScopeDeps(session_id=session))


async def test_redis_commands_of_a_run(configured: Redis) -> None:
    await run_once("first")  # loads the scripts
    before = await commands(configured)
    for n in range(10):
        await run_once(f"s{n}")
    spent = await commands(configured) - before
    sent = Counter({name: spent[name] for name in ("set", "evalsha", "eval", "xrange", "xrevrange", "xadd", "get")})
    assert sent["eval"] == 0, spent
    # Lease, begin, deadline, index, batches of events, facts, release. Batches depend on time, the rest does not.
    assert sent["set"] <= 10, spent
    assert sent["evalsha"] <= 10 * 16, spent
    # Acquiring reads both ends of the stream; steering looks for messages twice. The others are in scripts.
    assert sent["xrange"] + sent["xrevrange"] <= 10 * (2 + 2) + 2 * spent["evalsha"], spent
    assert spent["expire"] <= spent["evalsha"], spent  # no command of its own


async def test_a_turn_reads_of_the_run_before_only_its_end(configured: Redis) -> None:
    await run_once("s")
    before = await commands(configured)
    assert await read_lost_answer(1, 1, "s") == []
    spent = await commands(configured) - before
    assert (spent["xrevrange"], spent["xrange"]) == (1, 0)


async def test_calls_of_a_run_and_of_a_delta(configured: Redis) -> None:
    deltas = 400
    for _ in range(2):
        await run_once("warm")
    with Calls() as run:
        for n in range(10):
            await run_once(f"s{n}")
    agent: Agent[ScopeDeps, str] = Agent(scripted(["token "] * deltas), deps_type=ScopeDeps)
    with Calls() as long:
        await agx.run(MemorySession(id="long"), agent, "hi", deps=ScopeDeps(session_id="long"))
    # Five resumptions of three coroutines, and seven calls; what is done for a batch of deltas comes far less often.
    token_path = {name: count for name, count in long.items() if count > 0.9 * deltas}
    assert sum(token_path.values()) <= 22.5 * deltas, token_path
    # The number of round trips depends on time.
    by_trips = ("NodeBus.", "Connection.", "_Receiver.")
    lasting = {name: count for name, count in run.items() if not name.startswith(by_trips)}
    assert sum(lasting.values()) / 10 <= 935, run


async def test_bytes_to_and_from_redis(configured: Redis) -> None:
    for n in range(3):
        await run_once(f"warm{n}")
    runs, events = 10, 40
    before = await network(configured)
    for n in range(runs):
        await run_once(f"s{n}")
    received, sent = await network(configured) - before
    assert received <= runs * 8_000, received / runs
    assert sent <= runs * 520, sent / runs
    await agx.start(1, 1, "s")
    delivered: list[str] = []

    async def follow() -> None:
        async for event in agx.listen(1, 1, "s"):
            delivered.append(event)  # noqa: PERF401 - it is looked at meanwhile

    following = asyncio.create_task(follow())
    await agx.add(1, 1, "s", type="info", origin="test")
    await wait_until(lambda: len(delivered) == 2)
    before = await network(configured)
    for n in range(events):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
        await wait_until(lambda n=n: len(delivered) == n + 3)
    received, sent = await network(configured) - before
    # The entry goes in once with the script's other arguments, and out once, to all listeners of a process.
    assert received <= events * 260, received / events
    assert sent <= events * 190, sent / events
    await agx.stop(1, 1, "s")
    await following


async def test_objects_of_a_live_run(configured: Redis) -> None:
    """What a live run holds beside pydantic-ai's own objects, which are most of its 150 KiB."""

    async def count(drive: Callable[[Agent[ScopeDeps, str], str], Awaitable[object]]) -> float:
        gates = [Gate() for _ in range(21)]
        agents: list[Agent[ScopeDeps, str]] = [
            Agent(scripted(["one", gate, " two"]), deps_type=ScopeDeps) for gate in gates
        ]
        running = [asyncio.create_task(_until_done(drive(agents[0], "first")))]
        await gates[0].reached.wait()
        gc.collect()
        before = len(gc.get_objects())
        running += [asyncio.create_task(_until_done(drive(agent, f"s{n}"))) for n, agent in enumerate(agents[1:])]
        for gate in gates:
            await gate.reached.wait()
        await current_engine().queues.drain()
        gc.collect()
        held = (len(gc.get_objects()) - before) / (len(gates) - 1)
        for gate in gates:
            gate.open.set()
        await asyncio.gather(*running)
        return held

    async def pass_over(ctx: object, events: AsyncIterable[object]) -> None:
        async for _ in events:
            pass

    async def alone(agent: Agent[ScopeDeps, str], session: str) -> None:
        await agent.run("hi", deps=ScopeDeps(session_id=session), event_stream_handler=pass_over)

    async def ours(agent: Agent[ScopeDeps, str], session: str) -> None:
        await agx.run(MemorySession(id=session), agent, "hi", deps=ScopeDeps(session_id=session))

    bare = await count(alone)
    held = await count(ours)

    assert held <= bare + 180, (bare, held)


async def test_calls_of_a_round_trip(configured: Redis) -> None:
    control = current_engine().control
    await control.execute("GET", "k")
    with Calls() as calls:
        for _ in range(50):
            await control.execute("GET", "k")
    # No task, no timer and no coroutine; a slow command takes three resumptions more than a quick one.
    assert calls.total() / 50 <= 15, calls


async def test_redis_commands_of_a_session_that_is_followed_and_idle(
    configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = 0
    look = hub.Hub._poll_quiet

    def counted(hub: hub.Hub) -> None:
        nonlocal rounds
        rounds += 1
        look(hub)

    gate = Gate()
    agent: Agent[ScopeDeps, str] = Agent(scripted(["one", gate, " two"]), deps_type=ScopeDeps)
    running = asyncio.create_task(agx.run(MemorySession(id="s"), agent, "hi", deps=ScopeDeps()))
    received: list[Any] = []

    async def follow() -> None:
        async for event in agx.listen(1, 1, "s", serialize=False):
            received.append(event)  # noqa: PERF401 - it is looked at meanwhile

    following = asyncio.create_task(follow())
    await gate.reached.wait()
    await agx.add(1, 1, "s", type="info", origin="test")  # announced to a listener that has caught up
    await wait_until(lambda: received and received[-1]["type"] == "info")
    await agx.add(1, 1, "s", type="info", origin="test", body={"last": True})
    await wait_until(lambda: received[-1]["body"].get("last"))
    monkeypatch.setattr(hub, "POLL", 0.01)
    monkeypatch.setattr(hub.Hub, "_poll_quiet", counted)
    await wait_until(lambda: rounds >= 5)
    before = await commands(configured)
    rounds = 0
    await wait_until(lambda: rounds >= 100)
    spent = await commands(configured) - before
    assert spent["xrange"] + spent["get"] <= 4, spent
    gate.open.set()
    await running
    await following


async def test_reads_and_calls_of_a_delivery(configured: Redis) -> None:
    """Wake-ups bring the feed its entries; a client costs a few calls of functions for each event."""
    clients, events = 50, 20
    await agx.start(1, 1, "s")
    received = [0] * clients

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()

    async def follow(n: int) -> None:
        async def send(message: Message) -> None:
            received[n] += message.get("body", b"").count(b"data: ")

        live = LiveFrames()
        chunks = event_chunks(1, 1, "s", None, wait=3, live=live)
        await EventStreamResponse(chunks, keep_alive=15, live=live)({}, receive, send)

    following = [asyncio.create_task(follow(n)) for n in range(clients)]
    await wait_until(lambda: min(received) == 1)
    await agx.add(1, 1, "s", type="info", origin="test")
    await wait_until(lambda: min(received) == 2)
    before = await commands(configured)
    with Calls() as calls:
        for n in range(events):
            await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
            await wait_until(lambda n=n: min(received) == n + 3)
    spent = await commands(configured) - before
    assert spent["xrange"] <= events, spent  # by the script that appends
    per_delivery = calls.total() / (clients * events)
    # 11 of the feed, the listener and the response, and its share of the append.
    assert per_delivery <= 13, (per_delivery, calls)
    # One coroutine is resumed and no generator: each that waits takes a microsecond of a delivery to 1,000 clients.
    assert calls["Follower.next"] + calls["event_chunks"] < events, calls
    assert current_engine().hub.listeners == clients
    await agx.stop(1, 1, "s")
    await asyncio.gather(*following)


async def test_calls_of_an_event_in_a_replay(configured: Redis) -> None:
    events = 400
    await agx.start(1, 1, "s")
    for n in range(events):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
    await agx.stop(1, 1, "s", grace_period=60)
    with Calls("") as calls:
        frames = [frame async for frame in agx.sse(1, 1, "s")]
    assert len(frames) == events + 2
    per_event = {name: count for name, count in calls.items() if count >= events}
    # Its id, the entry, the frame and its JSON, and the generator; redis-py does nothing for each.
    assert sum(per_event.values()) <= 9.5 * len(frames), per_event
