"""The traces sink: a consumer group over all partitions; every replica works, and acknowledges what was exported."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from functools import partial

from opentelemetry.sdk.trace import ReadableSpan
from redis.exceptions import ResponseError

from agx.facts.decoding import UnknownFactError
from agx.facts.reader import QueueEntry, parse_entries
from agx.redis import keys
from agx.telemetry.conventions import Semconv

from ..link import BLOCK_MS, Link
from ..metrics import instruments as i
from ..metrics.series import Series
from ..metrics.table import Instrument
from ..source import (
    READ_COUNT,
    TRACES_GROUP,
    Decode,
    decode_fact,
    entries_by_key,
    group_partitions,
    is_no_queue,
    pause_between_reads,
)
from .export import (
    MAX_BYTES,
    MAX_SPANS,
    Export,
    Item,
)
from .spans import spans_of

logger = logging.getLogger(__name__)

LINGER = 0.2  # least seconds that a batch waits for more
EXPORT_PERIOD = 0.5  # seconds from one export to the next, unless the batch is full
DEAD_CONSUMER_MS = 3_600_000  # idle time after which a consumer without pending facts is forgotten
FIRST_WAIT, LONGEST_WAIT = 0.5, 5.0  # seconds between two attempts while the collector is down
_WAIT_FOR_QUEUE = 1.0  # seconds
_CREATE_GROUP = "return redis.call('XGROUP', 'CREATE', key, argument, '0')"


class TracesSink:
    """Reads facts as one of the group's consumers and exports their spans."""

    def __init__(
        self,
        link: Link,
        prefix: str,
        export: Export,
        own: Series,
        claim_idle: float,
        *,
        decode: Decode = decode_fact,
    ) -> None:
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.semconv: Semconv = "current"
        self.counts_malformed = True  # unless the metrics sink of this replica does
        self._link = link
        self._prefix = prefix
        self._export = export
        self._own = own
        self._decode = decode
        self._claim_idle = claim_idle
        self._waiting: asyncio.Queue[list[Item]]
        self._in_flight: set[tuple[str, str]] = set()
        self._drained = asyncio.Event()
        self._is_stopping = False
        self._exported_at = float("-inf")  # when the last export began (monotonic)

    async def run(self, partitions: int, stop: asyncio.Event) -> None:
        """Work until `stop`, then export what was read."""
        self._forget_in_flight()
        async with asyncio.TaskGroup() as tasks:
            readers = [
                tasks.create_task(self._read([keys.queue(self._prefix, n) for n in group]))
                for group in group_partitions(self._link, partitions)
            ]
            readers.append(tasks.create_task(self._take_over([keys.queue(self._prefix, n) for n in range(partitions)])))
            sender = tasks.create_task(self._send())
            await stop.wait()
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)
            for n in range(partitions):
                await self._accept_own(keys.queue(self._prefix, n))
            self._is_stopping = True
            await self._waiting.put([])  # wakes the sender
            await self._drained.wait()
            sender.cancel()

    def _forget_in_flight(self) -> None:
        """Begin anew: what an earlier run was about to send is pending, and claimed again in its time."""
        self._waiting = asyncio.Queue(maxsize=4)  # full: reading pauses
        self._is_stopping = False
        self._in_flight.clear()
        self._drained.set()

    async def leave(self, partitions: int) -> None:
        """Remove this consumer from the groups, where nothing of it is pending."""
        for n in range(partitions):
            await self._forget_consumers(keys.queue(self._prefix, n), only=self.consumer, idle_ms=0)

    async def _read(self, queues: Sequence[str]) -> None:
        """Read queues with one command, except those that do not exist yet."""
        ready: list[str] = []
        looked = float("-inf")
        while True:
            if len(ready) < len(queues) and time.monotonic() - looked >= _WAIT_FOR_QUEUE:
                looked = time.monotonic()
                ready = await self._link.persist("create the traces group", partial(self._create_groups, queues))
            if not ready:
                await asyncio.sleep(_WAIT_FOR_QUEUE)
                continue
            found = await self._link.persist("read facts for traces", partial(self._read_group, tuple(ready), ">"))
            if found is None:
                ready, looked = [], float("-inf")
                continue
            for key, entries in found.items():
                await self._accept(key, entries)
            if found:
                await pause_between_reads(found)

    async def _accept_own(self, key: str) -> None:
        """Queue what the server delivered to this consumer while its reader was being cancelled."""
        found = await self._link.persist("read own facts", lambda: self._read_group((key,), "0"))
        await self._accept(key, (found or {}).get(key, ()))

    async def _read_group(self, queues: Sequence[str], after: str) -> dict[str, list[QueueEntry]] | None:
        """Read facts that no consumer has got (`>`), or those that this one got and has not acknowledged (`0`).

        Returns None where a queue, or its group, is not there, or a key is no stream.
        """
        command = ("XREADGROUP", "GROUP", TRACES_GROUP, self.consumer, "COUNT", READ_COUNT, "BLOCK", BLOCK_MS)
        try:
            return entries_by_key(await self._link.call(*command, "STREAMS", *queues, *(after for _ in queues)))
        except ResponseError as error:
            if is_no_queue(error):
                return None
            raise

    async def _create_groups(self, queues: Sequence[str]) -> list[str]:
        """Create the group at the start of each queue, where it is missing; return the queues that have it.

        Where there is no queue, no group is created: it would create an empty stream, which never expires.
        """
        ready = []
        for key, reply in (await self._link.call_each(_CREATE_GROUP, dict.fromkeys(queues, TRACES_GROUP))).items():
            text = str(reply) if isinstance(reply, ResponseError) else ""
            if not text or text.startswith("BUSYGROUP"):
                ready.append(key)
            elif "requires the key to exist" not in text:
                self._link.report_refusal(f"create the traces group of {key}", reply)
        return ready

    async def _accept(self, key: str, entries: Sequence[QueueEntry]) -> None:
        """Queue facts, also those without spans, so that all are acknowledged together."""
        items = []
        for entry_id, payload in entries:
            if (key, entry_id) not in self._in_flight:
                fact_id, spans = self._read_spans(payload)
                items.append(Item(key, entry_id, fact_id, len(payload), tuple(spans)))
        if items:
            waiting = {(item.key, item.entry_id) for item in items}
            self._in_flight |= waiting
            self._drained.clear()
            try:
                await self._waiting.put(items)
            except asyncio.CancelledError:  # at SIGTERM, while the queue is full: `_accept_own` finds them again
                self._in_flight -= waiting
                raise

    def _read_spans(self, payload: bytes) -> tuple[str, list[ReadableSpan]]:
        """Return a fact's id and its spans; none of what is newer, malformed, or has ids that are none."""
        try:
            fact, _ = self._decode(payload)
            return fact.id, spans_of(fact, self.semconv)
        except UnknownFactError:
            return "", []
        except ValueError:
            if self.counts_malformed:
                self._count(i.MALFORMED)
            return "", []

    async def _send(self) -> None:
        batch: list[Item] = []
        wait = FIRST_WAIT
        while True:
            await self._gather(batch)
            if not batch:
                continue
            part = _cut_batch(batch)
            done = await self._export.send(part) if any(item.spans for item in part) else part
            if done:
                wait = FIRST_WAIT
                await self._acknowledge(done)
                finished = {(item.key, item.entry_id) for item in done}
                batch = [item for item in batch if (item.key, item.entry_id) not in finished]
                continue
            # The collector is down, or fails at these facts: the next ones will show which.
            batch = [*batch[len(part) :], *part]
            await asyncio.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT)

    async def _gather(self, batch: list[Item]) -> None:
        """Fill the batch with what waits; an empty one waits for the first chunk, then for more until its export."""
        if not batch:
            batch.extend(await self._waiting.get())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(LINGER, self._exported_at + EXPORT_PERIOD - time.monotonic())):
                while len(batch) < MAX_SPANS and not (self._is_stopping and self._waiting.empty()):
                    batch.extend(await self._waiting.get())
        self._exported_at = time.monotonic()

    async def _acknowledge(self, done: Sequence[Item]) -> None:
        by_key: dict[str, list[str]] = {}
        for item in done:
            by_key.setdefault(item.key, []).append(item.entry_id)
        for key, ids in by_key.items():

            async def acknowledge(key: str = key, ids: Sequence[str] = ids) -> None:
                try:
                    await self._link.call("XACK", key, TRACES_GROUP, *ids)
                except ResponseError as error:
                    if not is_no_queue(error):
                        raise

            await self._link.persist("acknowledge facts", acknowledge)
        self._in_flight.difference_update((item.key, item.entry_id) for item in done)
        if not self._in_flight:
            self._drained.set()

    async def _take_over(self, queues: Sequence[str]) -> None:
        """Claim the pending facts of consumers that are gone, and forget those consumers."""
        while True:
            await asyncio.sleep(self._claim_idle / 2)
            for key in queues:
                if self._export.down_since is not None:  # what is claimed now would only wait here
                    break
                await self._link.persist("take over facts of dead replicas", partial(self._claim, key))
                await self._link.persist(
                    "forget dead replicas", partial(self._forget_consumers, key, idle_ms=DEAD_CONSUMER_MS)
                )

    async def _claim(self, key: str) -> None:
        start = "0-0"
        idle_ms = int(self._claim_idle * 1000)
        while True:
            try:
                reply = await self._link.call(
                    "XAUTOCLAIM", key, TRACES_GROUP, self.consumer, idle_ms, start, "COUNT", READ_COUNT
                )
            except ResponseError as error:
                if is_no_queue(error):
                    return
                raise
            start = reply[0].decode()
            if len(reply) > 2 and reply[2]:
                logger.warning("%d facts of a dead replica were trimmed before their export in %s", len(reply[2]), key)
                self._count(i.SPANS_FAILED, len(reply[2]))
            await self._accept(key, parse_entries(reply[1]))
            if start == "0-0":
                return

    async def _forget_consumers(self, key: str, *, idle_ms: int, only: str | None = None) -> None:
        try:
            consumers = await self._link.call("XINFO CONSUMERS", key, TRACES_GROUP)
        except ResponseError as error:
            if is_no_queue(error):
                return
            raise
        for consumer in consumers:
            name = consumer["name"].decode()
            if not consumer["pending"] and consumer["idle"] >= idle_ms and only in {None, name}:
                await self._link.call("XGROUP DELCONSUMER", key, TRACES_GROUP, name)

    def _count(self, instrument: Instrument, amount: int = 1) -> None:
        self._own.counter(instrument).add(amount)


def _cut_batch(items: Sequence[Item]) -> list[Item]:
    """Return the items that one export may carry; at least one."""
    batch: list[Item] = []
    spans = size = 0
    for item in items:
        spans += len(item.spans)
        size += item.size
        if batch and (spans > MAX_SPANS or size > MAX_BYTES):
            break
        batch.append(item)
    return batch
