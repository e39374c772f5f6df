"""What `agx.redis.redis_py` uses of redis-py and hiredis that they do not document: fails where a release moves it."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import redis
from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ReadOnlyError
from support.waiting import wait_until

from agx.redis.cluster_bus import open_bus
from agx.redis.redis_py import (
    NO_REPLY,
    Connection,
    _Receiver,
    make_connection,
    make_node_connection,
    pack_command,
    startup_addresses,
)


@pytest.fixture
def connection(redis_url: str) -> Connection:
    return make_connection(Redis.from_url(redis_url))


async def receive_all(connection: Connection, commands: list[tuple[str | bytes | int, ...]]) -> list[Any]:
    """Send commands and return their replies, in their order."""
    replies: list[Any] = []
    lost: list[BaseException] = []

    def on_received() -> None:
        while (reply := connection.take_received()) is not NO_REPLY:
            replies.append(reply)

    connection.receive(on_received, lost.append)
    connection.write(b"".join(pack_command(args) for args in commands))
    await wait_until(lambda: len(replies) >= len(commands))
    assert not lost
    return replies


async def test_commands_are_packed_and_their_replies_received(connection: Connection) -> None:
    assert connection.take_received() is NO_REPLY
    await connection.open()
    commands = [("SET", "k", b"\xff", "EX", 60), ("GET", "k"), ("ECHO", b"x" * 200_000)]
    assert await receive_all(connection, commands) == [b"OK", b"\xff", b"x" * 200_000]
    assert connection.is_open
    await connection.close()


async def test_an_error_reply_is_received_as_redis_py_raises_it(connection: Connection) -> None:
    await connection.open()
    failing = ("EVAL", "return redis.error_reply('READONLY x')", 0)
    _, error, last = await receive_all(connection, [("PING",), failing, ("PING",)])
    assert type(error) is ReadOnlyError
    assert last == b"PONG"
    await connection.close()


async def test_a_pushed_message_is_received_without_a_command(connection: Connection, redis_url: str) -> None:
    await connection.open()
    assert (await receive_all(connection, [("SUBSCRIBE", "c")]))[0][:2] == [b"subscribe", b"c"]
    messages: list[Any] = []
    connection.receive(lambda: messages.append(connection.take_received()), lambda error: None)
    async with Redis.from_url(redis_url) as other:
        await other.publish("c", "one")
    await wait_until(lambda: messages)
    assert messages == [[b"message", b"c", b"one"]]
    await connection.close()


async def test_a_goodbye_is_noticed_on_an_idle_connection(connection: Connection, redis_url: str) -> None:
    lost: list[BaseException] = []
    await connection.open()
    connection.receive(lambda: None, lost.append)
    assert connection.is_open
    async with Redis.from_url(redis_url) as other:
        await other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await wait_until(lambda: lost)
    assert not connection.is_open
    await connection.open()  # anew
    assert await receive_all(connection, [("PING",)]) == [b"PONG"]
    await connection.close()


async def test_a_connection_that_was_given_up_calls_nobody(connection: Connection) -> None:
    lost: list[BaseException] = []
    await connection.open()
    connection.receive(lambda: None, lost.append)
    connection.write(pack_command(("PING",)))
    connection.abort()
    await connection.open()
    assert await receive_all(connection, [("ECHO", b"x")]) == [b"x"]
    assert not lost
    await connection.close()


async def test_commands_issued_while_a_connection_is_lost_wait_for_one_new_connection(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[None] = []
    bus = open_bus(Redis.from_url(redis_url), lambda: opened.append(None))
    await bus.execute("PING")
    loop, replies = asyncio.get_running_loop(), list[asyncio.Future[Any]]()

    def issue_first() -> None:  # just before the loop reports the loss, so that it sends just after it
        replies.append(bus.execute("ECHO", "first"))
        loop.call_soon(loop.call_soon, issue_second)

    def issue_second() -> None:
        replies.append(bus.execute("ECHO", "second"))

    monkeypatch.setattr(_Receiver, "eof_received", lambda receiver: loop.call_soon(issue_first) and None)
    async with Redis.from_url(redis_url) as other:
        await other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await wait_until(lambda: len(replies) == 2)
    assert await asyncio.gather(*replies) == [b"first", b"second"]
    assert len(opened) == 2
    await bus.aclose()


@pytest.mark.parametrize("wrong", [None, "\ud800"])
async def test_a_command_that_cannot_be_packed_fails_alone(redis_url: str, wrong: Any) -> None:
    bus = open_bus(Redis.from_url(redis_url), lambda: None)
    replies = [bus.execute("ECHO", argument) for argument in ("a", wrong, "b")]
    first, refused, last = await asyncio.gather(*replies, return_exceptions=True)
    assert (first, last, type(refused)) == (b"a", b"b", TypeError if wrong is None else UnicodeEncodeError)
    await bus.aclose()


async def test_replies_have_the_shape_that_users_know(connection: Connection) -> None:
    assert connection.parse("XRANGE", [[b"1-0", [b"a", b"b"]]]) == [(b"1-0", {b"a": b"b"})]
    assert connection.parse("GETEX", b"x") == b"x"
    await connection.close()


def test_settings_of_each_kind_of_client_are_found() -> None:
    """The names of the private attributes; what is done with them is tested on the real topologies."""
    sentinel = Sentinel([("h", 1)])  # type: ignore[no-untyped-call]
    pool = sentinel.master_for("name").connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert (pool.service_name, pool.sentinel_manager) == ("name", sentinel)
    assert inspect.iscoroutinefunction(pool.get_master_address)
    assert make_connection(sentinel.master_for("name")).has_sentinel

    cluster = RedisCluster(startup_nodes=[ClusterNode("h", 1)], address_remap=lambda address: ("there", address[1]))
    assert startup_addresses(cluster) == [("h", 1)]
    assert cluster.nodes_manager.remap_host_port("h", 1) == ("there", 1)
    assert make_node_connection(cluster, "h", 2).address == ("h", 2)


def test_the_reading_without_a_deadline_is_still_offered() -> None:
    parameters = inspect.signature(redis.asyncio.Connection.read_response).parameters
    assert {"timeout", "disconnect_on_error"} <= parameters.keys()
    assert "math.inf" in (inspect.getdoc(redis.asyncio.Connection.read_response) or "")
