"""A TCP proxy between agx and its server: cuts, refuses, slows and freezes connections, and loses replies."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

_CHUNK = 65_536


class Proxy:
    """Listens on a port of its own and passes bytes on; an asynchronous context manager.

    `delay`: seconds each chunk is held back in either direction; may be changed at any time.
    """

    def __init__(self, port: int, *, host: str = "127.0.0.1", delay: float = 0.0) -> None:
        self.delay = delay
        self.connections = 0  # accepted so far
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._answering = asyncio.Event()
        self._answering.set()
        self._refusing = False
        self._replies_to_lose = 0

    @property
    def port(self) -> int:
        assert self._server is not None, "the proxy is used as a context manager"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break every connection, as a reset would; new ones are accepted."""
        for writer in list(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Break every connection, and every new one, until `accept()`."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    def freeze(self) -> None:
        """Pass nothing on and break nothing, as a cut cable does, until `thaw()`."""
        self._flowing.clear()

    def withhold_answers(self) -> None:
        """Have the server do what it is asked, and keep its answers back until `thaw()`."""
        self._answering.clear()

    def thaw(self) -> None:
        """Pass on again, what was held back first."""
        self._flowing.set()
        self._answering.set()

    def lose_replies(self, count: int = 1) -> None:
        """Have the server do what it is asked, but break the connection instead of passing its answer on."""
        self._replies_to_lose = count

    @property
    def replies_to_lose(self) -> int:
        """How many of them are still to be lost."""
        return self._replies_to_lose

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.thaw()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        self._writers.add(writer)
        try:
            if self._refusing:
                return
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._writers.add(far_writer)
            try:
                ways = [
                    asyncio.ensure_future(self._pass_on(reader, far_writer, answers=False)),
                    asyncio.ensure_future(self._pass_on(far_reader, writer, answers=True)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        except OSError:
            pass  # the server is away: so are its connections
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await reader.read(_CHUNK):
            if self.delay:
                await asyncio.sleep(self.delay)
            await self._flowing.wait()
            if answers:
                await self._answering.wait()
            if answers and self._replies_to_lose:
                self._replies_to_lose -= 1
                return
            writer.write(data)
            await writer.drain()
