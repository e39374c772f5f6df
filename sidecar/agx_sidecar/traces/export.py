"""Exports batches of facts: finds the facts that the collector refuses, counts what came of the spans."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from opentelemetry.sdk.trace import ReadableSpan

from agx.telemetry.conventions import RUN_ID

from ..log import RepeatedWarnings
from ..metrics import instruments as i
from ..metrics.series import Series
from ..metrics.table import Instrument
from .otlp import Answer, Transport, Verdict

logger = logging.getLogger(__name__)

MAX_SPANS = 512  # of a batch
MAX_BYTES = 3 * 1024 * 1024  # of a batch's facts, which are longer than their spans; gRPC stops at 4 MiB
MAX_SUSPECTS = 3  # facts in a row that fail alone before the collector counts as down
_GRACE = 2.0  # seconds beyond the exporter's own timeout


@dataclass(frozen=True, slots=True)
class Item:
    """A fact with spans that waits for the collector."""

    key: str
    entry_id: str
    fact_id: str
    size: int
    spans: tuple[ReadableSpan, ...]


def _ids(item: Item) -> dict[str, str]:
    """For logs as JSON."""
    span = item.spans[0]
    context = span.get_span_context()
    run_id = (span.attributes or {}).get(RUN_ID, "")
    return {"run_id": str(run_id), "trace_id": f"{context.trace_id:032x}" if context else ""}


class Export:
    """Sends items and returns those that are finished: taken by the collector, or dropped."""

    def __init__(self, transport: Transport, own: Series, timeout: float) -> None:
        """`timeout`: seconds that the exporter may take for a batch, its retries included."""
        self._transport = transport
        self._own = own
        self._deadline = timeout + _GRACE
        self._running: Future[Answer] | None = None
        self._warnings = RepeatedWarnings(logger)
        self.down_since: float | None = None
        own.zero_initialize(i.EXPORT_SUCCESS)  # from the start, so that an alert sees that none has ever succeeded

    async def send(self, items: Sequence[Item]) -> list[Item]:
        """Export a batch and return the items that are finished; halves what fails until the failing facts are alone.

        A fact that the collector refuses is dropped. One that makes it fail is dropped once the collector has taken
        another one afterwards: that shows that the collector works. Returns fewer items than it was given if the
        collector is down, or if nothing has shown yet that it works; the rest has to be sent again.
        """
        done: list[Item] = []
        suspects: list[Item] = []
        parts = [list(items)]
        while parts and len(suspects) < MAX_SUSPECTS:
            part = parts.pop()
            answer = await self._try(part)
            if answer.verdict is Verdict.UNAVAILABLE:
                break
            if answer.verdict is Verdict.TAKEN:
                for item in suspects:
                    self._drop(item)
                done += [*suspects, *part]
                suspects.clear()
            elif len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            elif answer.verdict is Verdict.REFUSED:
                self._drop(part[0], answer.text)
                done += part
            else:
                suspects += part
        if not done and items:
            self._report_outage(answer.text)
        return done

    def _drop(self, item: Item, reason: str = "it fails at them, and takes others") -> None:
        logger.error(
            "the collector refuses the spans of fact %s (%s in %s, %d bytes), which are dropped: %s",
            item.fact_id,
            item.entry_id,
            item.key,
            item.size,
            reason,
            extra=_ids(item),
        )
        self._count(i.SPANS_FAILED, len(item.spans))

    async def _try(self, items: Sequence[Item]) -> Answer:
        spans = [span for item in items for span in item.spans]
        answer = await self._send(spans)
        if answer.verdict is not Verdict.TAKEN:
            return answer
        rejected = min(answer.rejected, len(spans))
        if rejected:
            self._warnings.warn(f"the collector rejected spans of a batch that it took: {answer.text}")
        self._count(i.SPANS_FAILED, rejected)
        self._count(i.SPANS_EXPORTED, len(spans) - rejected)
        if rejected < len(spans):
            self._own.counter(i.EXPORT_SUCCESS).value = time.time_ns()
        if self.down_since is not None:
            logger.info("the collector takes spans again after %.1f s", time.monotonic() - self.down_since)
            self.down_since = None
        return answer

    async def _send(self, spans: Sequence[ReadableSpan]) -> Answer:
        """Send in a thread; after the deadline the request is cut off, and a thread that goes on all the same is left.

        While such a thread is there, nothing else is sent.
        """
        if self._running is None or self._running.done():
            self._running = _call(self._transport, spans)
            answer = await self._wait(self._running)
            if answer is not None:
                return answer
            self._transport.cut()
        await self._wait(self._running)
        return Answer(Verdict.UNAVAILABLE, text=f"no answer within {self._deadline:g} s")

    async def _wait(self, running: Future[Answer]) -> Answer | None:
        waiting = asyncio.wrap_future(running)
        done, _ = await asyncio.wait({waiting}, timeout=self._deadline)
        return waiting.result() if done else None

    def _report_outage(self, text: str) -> None:
        if self.down_since is None:
            self.down_since = time.monotonic()
            logger.warning("the collector takes no spans (%s); they wait in the queue", text)

    def _count(self, instrument: Instrument, amount: int) -> None:
        self._own.counter(instrument).add(amount)

    def close(self) -> None:
        """Release the connections; a request under way ends, or goes on in a thread that holds nothing up."""
        self._transport.close()


def _call(transport: Transport, spans: Sequence[ReadableSpan]) -> Future[Answer]:
    """Send in a daemon thread: the interpreter does not wait for it at its exit, as it would for a pool's."""
    future: Future[Answer] = Future()

    def send() -> None:
        try:
            future.set_result(transport.send(spans))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=send, name="otlp", daemon=True).start()
    return future
