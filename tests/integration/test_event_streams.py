"""Event streams over HTTP: clients that stall are dropped, others go on, a shutdown does not wait for them."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.waiting import wait_until

import agx
from agx.engine.registry import current_engine
from agx.redis_session import RedisSessions
from agx.stream.entry import StreamEntry
from agx.web import event_stream, make_router

_TEXT = "x" * 200_000
_EVENTS = 50  # more than all buffers between server and client hold


@pytest.fixture
async def port(configured: Redis) -> AsyncIterator[int]:
    """The port of an agx router under uvicorn, in this loop."""
    app = FastAPI()
    sessions = RedisSessions()
    app.include_router(make_router(Agent(TestModel()), authorize=lambda: (1, 1), sessions=sessions, keep_alive=0.2))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        await wait_until(lambda: server.started)
        yield listening.getsockname()[1]
        server.should_exit = True
        await serving  # it waits for every connection


class Client:
    """A client's socket with small buffers; it takes nothing until it is read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def follow(cls, port: int, last_event_id: str = "", query: str = "") -> Client:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        client = cls(*await asyncio.open_connection(sock=connection, limit=4_096))
        cursor = f"Last-Event-ID: {last_event_id}\r\n" if last_event_id else ""
        client.writer.write(f"GET /sessions/s/events{query} HTTP/1.1\r\nHost: test\r\n{cursor}\r\n".encode())
        return client

    async def until(self, text: bytes) -> bytes:
        """Read until a text has come; return all of it."""
        found = bytearray()
        while text not in found[-65_536 - len(text) :]:
            async with asyncio.timeout(30):
                part = await self.reader.read(65_536)
            assert part, f"it ended before {text!r}: {found[-200:]!r}"
            found += part
        return bytes(found)

    def close(self) -> None:
        self.writer.close()


def ids_of(found: bytes) -> list[str]:
    return re.findall(r"^id: (\S+)$", found.decode(errors="replace"), re.MULTILINE)


async def write_all() -> None:
    for n in range(_EVENTS):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n, "text": _TEXT})
    await agx.stop(1, 1, "s", grace_period=60)


async def test_a_client_that_stalls_is_dropped_and_resumes_while_others_go_on(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "_STALLED", 2.0)
    monkeypatch.setattr(event_stream, "_LOOK_EVERY", 0.1)
    await agx.start(1, 1, "s")
    stalled = await Client.follow(port)
    (begin,) = ids_of(await stalled.until(b'"begin"'))
    good = [await Client.follow(port) for _ in range(3)]
    received = [asyncio.create_task(client.until(b'"type":"end"')) for client in good]
    await write_all()
    whole = [ids_of(found) for found in await asyncio.gather(*received)]
    assert all(len(ids) == _EVENTS + 2 for ids in whole)
    await wait_until(lambda: current_engine().hub.listeners == 0, what="the stalled client is dropped")
    again = await Client.follow(port, begin)
    assert ids_of(await again.until(b'"type":"end"')) == whole[0][1:]
    for client in (stalled, again, *good):
        client.close()


async def test_a_stream_of_a_session_stays_open_between_its_runs_and_ends_at_a_shutdown(port: int) -> None:
    client = await Client.follow(port, query="?follow=session")
    for _ in range(2):
        await client.until(b": keep-alive")
        await agx.start(1, 1, "s")
        await client.until(b'"begin"')
        await agx.stop(1, 1, "s", grace_period=60)
        await client.until(b'"type":"end"')
    event_stream.close_streams()
    await client.until(b"0\r\n\r\n")  # the last chunk
    client.close()


async def test_a_client_that_is_slow_but_reads_is_kept(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "_STALLED", 2.0)
    monkeypatch.setattr(event_stream, "_LOOK_EVERY", 0.05)
    await agx.start(1, 1, "s")
    slow = await Client.follow(port)
    await write_all()
    found = b""
    # Several times the limit passes while the server never gets rid of all that it has for this client.
    for _ in range(8):
        found += await slow.reader.readexactly(400_000)
        await asyncio.sleep(0.5)
    found += await slow.until(b'"type":"end"')
    assert len(ids_of(found)) == _EVENTS + 2
    slow.close()


async def test_a_client_that_leaves_is_noticed_at_once(port: int) -> None:
    await agx.start(1, 1, "s")
    client = await Client.follow(port)
    await client.until(b'"begin"')
    assert current_engine().hub.listeners == 1
    client.close()
    await wait_until(lambda: current_engine().hub.listeners == 0)
    await agx.stop(1, 1, "s")


async def test_silence_is_filled_with_comments(port: int) -> None:
    await agx.start(1, 1, "s")
    client = await Client.follow(port)
    await client.until(b": keep-alive\n\n\r\ne\r\n: keep-alive")
    await agx.stop(1, 1, "s")
    assert b"keep-alive" not in (await client.until(b"0\r\n\r\n")).partition(b'"end"')[2]
    client.close()


async def test_frames_that_are_there_together_leave_in_few_writes(
    port: int, configured: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await agx.start(1, 1, "s")
    for n in range(1_000):
        await agx.add(1, 1, "s", type="info", origin="test", body={"n": n})
    await agx.stop(1, 1, "s", grace_period=60)
    chunks: list[bytes] = []
    write: Any = event_stream._OpenStream._write

    async def counted(stream: Any, chunk: bytes) -> None:
        chunks.append(chunk)
        await write(stream, chunk)

    monkeypatch.setattr(event_stream._OpenStream, "_write", counted)
    client = await Client.follow(port)
    assert len(ids_of(await client.until(b'"type":"end"'))) == 1_002
    assert len(chunks) < 10
    client.close()


async def test_events_that_arrive_together_and_exceed_a_chunk_arrive_whole_and_in_order(
    port: int, configured: Redis
) -> None:
    await agx.start(1, 1, "s")
    client = await Client.follow(port)
    found = await client.until(b'"begin"')
    for burst in range(3):  # the first one ends the client's catching up
        pipeline = configured.pipeline()
        for n in range(4):
            pipeline.xadd(
                "agx:1:1:s", {"type": "info", "origin": "test", "body": f'{{"n":"{burst}.{n}{"x" * 40_000}"}}'}
            )
        await pipeline.execute()
        await agx.add(1, 1, "s", type="info", origin="test", body={"last": burst})  # with its wake-up all are read
        found += await client.until(b'"last":%d' % burst)
    assert re.findall(rb'{"n":"(\d\.\d)', found) == [b"%d.%d" % (burst, n) for burst in range(3) for n in range(4)]
    await agx.stop(1, 1, "s")
    client.close()


async def test_a_client_that_waits_holds_no_entry_that_it_has_received(port: int, configured: Redis) -> None:
    await agx.start(1, 1, "s")
    for n in range(200):
        await configured.xadd("agx:1:1:s", {"type": "info", "origin": "test", "body": f'{{"replayed":{n}}}'})
    client = await Client.follow(port)
    await client.until(b'{"replayed":199}')
    await client.until(b": keep-alive")

    def held() -> list[StreamEntry]:
        objects = gc.get_objects()
        return [one for one in objects if isinstance(one, StreamEntry) and b"replayed" in one.raw_body]

    assert not held()
    await agx.stop(1, 1, "s")
    client.close()


async def test_a_shutdown_ends_a_silent_stream_in_good_order(port: int) -> None:
    await agx.start(1, 1, "s")
    client = await Client.follow(port)
    await client.until(b'"begin"')
    event_stream.close_streams()
    assert (await client.until(b"0\r\n\r\n")).endswith(b"0\r\n\r\n")
    assert current_engine().hub.listeners == 0
    late = await Client.follow(port)  # one that is opened meanwhile still gets what is stored
    assert ids_of(await late.until(b"0\r\n\r\n"))
    await agx.stop(1, 1, "s")
    for each in (client, late):
        each.close()
