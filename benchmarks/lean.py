"""The limit of streaming: raw XADDs that nobody waits for, and a raw XREAD BLOCK loop on its own connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import hiredis
from pydantic_ai import Agent
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent

from .agents import Drive

_CHUNK = 65_536
_PREFIX = "lean"


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


def _pack(*command: str | int | bytes) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type] # its stub takes one argument
    return packed


class LeanWriter:
    """One connection; replies are thrown away."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._discarding = asyncio.ensure_future(self._discard(reader))

    @classmethod
    async def open(cls, url: str) -> LeanWriter:
        return cls(*await _connect(url))

    @staticmethod
    async def _discard(reader: asyncio.StreamReader) -> None:
        while await reader.read(_CHUNK):
            pass

    def add(self, session_id: str, text: str) -> None:
        self._writer.write(_pack("XADD", f"{_PREFIX}:{session_id}", "*", "text", text))

    async def aclose(self) -> None:
        self._writer.close()
        await self._discarding

    def drive(self) -> Drive:
        """Return the bare loop with an XADD for each text: what any streaming must cost at least."""

        async def run(agent: Agent[Any, str], session_id: str) -> None:
            async with agent.iter("Hello") as agent_run:
                async for node in agent_run:
                    if Agent.is_model_request_node(node):
                        async with node.stream(agent_run.ctx) as stream:
                            async for event in stream:
                                if isinstance(event, PartDeltaEvent):
                                    self.add(session_id, event.delta.content_delta)  # type: ignore[arg-type,union-attr]
                                elif isinstance(event, PartStartEvent):
                                    self.add(session_id, event.part.content)  # type: ignore[arg-type,union-attr]
            self.add(session_id, "end")

        return run


async def read_lean(url: str, session_id: str) -> AsyncIterator[str]:
    """Yield the texts of a stream, up to its end."""
    stream, writer = await _connect(url)
    parser = hiredis.Reader()
    cursor: bytes | str = "0"
    try:
        while True:
            writer.write(_pack("XREAD", "BLOCK", 60_000, "STREAMS", f"{_PREFIX}:{session_id}", cursor))
            while (reply := parser.gets()) is False:
                parser.feed(await stream.read(_CHUNK))
            for entry_id, (_, text) in reply[0][1]:
                cursor = entry_id
                if text == b"end":
                    return
                yield text.decode()
    finally:
        writer.close()
