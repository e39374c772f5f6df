"""The bus of a cluster: every command goes to the node that has its key, over that node's own bus.

redis-py's cluster pipeline was not taken: a dead node fails the commands of all nodes in it, whether they were executed
or not, and with errors as replies it never learns that a slot has moved.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from .address import RedisAddress, open_redis
from .bus import CONNECTION_ERRORS, Bus, NodeBus, Script, fail_reply
from .redis_py import (
    CONNECT_TIMEOUT,
    Address,
    Arg,
    Connection,
    Reply,
    make_connection,
    make_node_connection,
    remap_address,
    startup_addresses,
)

_SLOTS = 16_384
_HOPS = 5  # redirections of one command
_REFRESH_EVERY = 0.1  # seconds between two looks at the slots while a node is in trouble


@dataclass(slots=True)
class _Routed:
    """A command on its way: `send` issues it on a node's bus."""

    slot: int
    send: Callable[[NodeBus], asyncio.Future[Reply]]
    reply: asyncio.Future[Reply]
    hops: int = 0


class ClusterBus(Bus):
    """One connection per primary that has one of our keys."""

    delivers_messages = False  # a message passes from node to node, and is lost where their link is broken

    def __init__(self, source: RedisCluster, on_break: Callable[[], None]) -> None:
        self._source = source
        self._on_break = on_break
        self._nodes: dict[Address, NodeBus] = {}
        self._slots: list[Address | None] = [None] * _SLOTS
        self._waiting: list[_Routed] = []  # for the slots
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed = float("-inf")
        self._breaks = 0
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def breaks(self) -> int:
        return self._breaks

    def execute(self, *args: Arg, as_sent: bool = False) -> asyncio.Future[Reply]:
        # PUBLISH reaches all nodes from any, so its channel does as a key.
        return self._issue(str(args[1]) if len(args) > 1 else "", lambda bus: bus.execute(*args, as_sent=as_sent))

    def run(self, script: Script, key: str, *args: Arg) -> asyncio.Future[Reply]:
        return self._issue(key, lambda bus: bus.run(script, key, *args))

    def _issue(self, key: str, send: Callable[[NodeBus], asyncio.Future[Reply]]) -> asyncio.Future[Reply]:
        routed = _Routed(key_slot(key.encode()), send, asyncio.get_running_loop().create_future())
        self._route(routed)
        return routed.reply

    def _route(self, routed: _Routed) -> None:
        address = self._slots[routed.slot]
        if address is None:
            self._waiting.append(routed)
            self._refresh()
        else:
            self._send(routed, self._node(address))

    def _send(self, routed: _Routed, node: NodeBus) -> None:
        routed.send(node).add_done_callback(functools.partial(self._on_reply, routed))

    def _on_reply(self, routed: _Routed, sent: asyncio.Future[Reply]) -> None:
        error = sent.exception()
        if isinstance(error, AskError) and routed.hops < _HOPS and not asyncio.get_running_loop().is_closed():
            # A redirected command was not executed, so it may be sent again.
            routed.hops += 1
            try:
                address = remap_address(self._source, error.host, error.port)
            except RedisError as failure:
                fail_reply(routed.reply, failure)
                return
            if isinstance(error, MovedError):
                self._slots[routed.slot] = address
                self._note_break()
                self._refresh()
                self._route(routed)
            else:
                node = self._node(address)
                node.execute("ASKING")  # for the one command after it on this connection
                self._send(routed, node)
            return
        if isinstance(error, (*CONNECTION_ERRORS, ClusterDownError)):
            self._refresh()
        if error is not None:
            fail_reply(routed.reply, error)
        elif not routed.reply.done():
            routed.reply.set_result(sent.result())

    def _node(self, address: Address) -> NodeBus:
        node = self._nodes.get(address)
        if node is None:
            maker = functools.partial(make_node_connection, self._source, *address)
            node = self._nodes[address] = NodeBus(maker, self._note_break)
        return node

    def _note_break(self) -> None:
        self._breaks += 1
        self._on_break()

    # --- which node has which slot ---

    def _refresh(self) -> None:
        """Look the slots up again, soon; commands go on meanwhile by what is known."""
        if self._refreshing is None:
            self._refreshing = asyncio.get_running_loop().create_task(self._read_slots(), name="agx-cluster-slots")

    async def _read_slots(self) -> None:
        loop = asyncio.get_running_loop()
        failure: BaseException = RedisConnectionError("no node of the cluster is known")
        try:
            await asyncio.sleep(max(0.0, self._refreshed + _REFRESH_EVERY - loop.time()))
            self._refreshed = loop.time()
            for address in self._candidates():
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT):
                        ranges = await self._node(address).execute("CLUSTER", "SLOTS")
                    self._take_slots(address, ranges)
                except (RedisError, OSError) as error:
                    failure = error
                else:
                    return
        finally:
            self._refreshing = None
            waiting, self._waiting = self._waiting, []
            for routed in waiting:
                if self._slots[routed.slot] is not None:
                    self._route(routed)
                elif not routed.reply.done():
                    fail_reply(routed.reply, failure)

    def _candidates(self) -> list[Address]:
        """Return whom to ask: nodes that are known, then those that the user named."""
        known = list(self._nodes)
        random.shuffle(known)
        return [*known, *(address for address in startup_addresses(self._source) if address not in self._nodes)]

    def _take_slots(self, told_by: Address, ranges: Reply) -> None:
        slots: list[Address | None] = [None] * _SLOTS
        for first, last, primary, *_ in ranges:
            host = (primary[0] or b"").decode() or told_by[0]
            address = remap_address(self._source, host, int(primary[1]))
            slots[first : last + 1] = [address] * (last - first + 1)
        self._slots = slots
        in_use = set(slots)
        for address in [address for address in self._nodes if address not in in_use]:
            closing = asyncio.get_running_loop().create_task(self._nodes.pop(address).aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def make_subscriber(self) -> Connection:
        """Return a connection to any primary: PUBLISH reaches them all."""
        if not any(self._slots):
            self._refresh()
            assert self._refreshing is not None
            await asyncio.wait({self._refreshing})
        addresses = {address for address in self._slots if address is not None}
        if not addresses:
            raise RedisConnectionError("no node of the cluster can be reached")
        return make_node_connection(self._source, *random.choice(sorted(addresses)))

    def is_current(self, connection: Connection) -> bool:
        return not any(self._slots) or connection.address in self._slots

    async def aclose(self) -> None:
        if (refreshing := self._refreshing) is not None:
            refreshing.cancel()
            await asyncio.gather(refreshing, return_exceptions=True)
        nodes = [*self._nodes.values()]
        self._nodes.clear()
        await asyncio.gather(*(node.aclose() for node in nodes), *self._closing, return_exceptions=True)


def open_bus_at(address: RedisAddress, *, client_name: str) -> Bus:
    """Return a bus to an address, for a process that has no client there."""
    return open_bus(open_redis(address, client_name=client_name), lambda: None)


def open_bus(source: Redis | RedisCluster, on_break: Callable[[], None]) -> Bus:
    """Return a bus to wherever the user's client leads."""
    if isinstance(source, RedisCluster):
        return ClusterBus(source, on_break)
    return NodeBus(functools.partial(make_connection, source), on_break)
