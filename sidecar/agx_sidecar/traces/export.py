"""Hands batches of spans to the collector, in a thread of its own; finds the fact that a collector refuses.

The official exporters say only whether a batch was taken, and sleep for seconds before they say no. So a batch that
fails three times is tried fact by fact: while others go through, the collector is up, and those that do not are guilty.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from agx.telemetry.conventions import RUN_ID

from ..metrics import instruments as i
from ..metrics.series import Series
from ..settings import Settings, SettingsError

logger = logging.getLogger(__name__)

MAX_SPANS = 512  # of a batch
MAX_BYTES = 3 * 1024 * 1024  # of a batch's facts, which are longer than their spans; gRPC stops at 4 MiB
TRIES = 3
PROBES = 3  # facts tried alone before the collector counts as down
_FIRST_WAIT = 0.2  # seconds between two tries; doubles


@dataclass(frozen=True, slots=True)
class Item:
    """A fact with spans that waits for the collector."""

    key: str
    entry_id: str
    fact_id: str
    size: int
    spans: tuple[ReadableSpan, ...]


def open_exporter(settings: Settings) -> SpanExporter:
    """Return the official exporter, which reads endpoint, headers, certificates and timeout from `OTEL_*`.

    Raises:
        SettingsError: those contradict each other.
    """
    try:
        return GrpcExporter() if settings.otlp_protocol == "grpc" else HttpExporter()
    except Exception as error:  # each exporter has error classes of its own
        raise SettingsError(f"the OTEL_EXPORTER_OTLP_* variables can't be used: {error}") from None


def _ids(item: Item) -> dict[str, str]:
    """For logs as JSON."""
    span = item.spans[0]
    context = span.get_span_context()
    run_id = (span.attributes or {}).get(RUN_ID, "")
    return {"run_id": str(run_id), "trace_id": f"{context.trace_id:032x}" if context else ""}


class LastWords(logging.Handler):
    """Keeps what an exporter last complained about: it would log every try."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class Export:
    """Sends items and tells which were dealt with."""

    def __init__(self, exporter: SpanExporter, own: Series) -> None:
        self._exporter = exporter
        self._own = own
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="otlp")
        self._words = LastWords()
        self.down_since: float | None = None
        for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
            noisy = logging.getLogger(name)
            noisy.propagate = False
            noisy.addHandler(self._words)

    async def send(self, items: Sequence[Item]) -> list[Item]:
        """Export a batch and return the items that are done: taken by the collector, or set aside.

        Returns fewer than it was given only if the collector is down: what is left has to be sent again.
        """
        wait = _FIRST_WAIT
        for attempt in range(TRIES):
            if await self._try(items):
                return list(items)
            if attempt + 1 < TRIES:
                await asyncio.sleep(wait)
                wait *= 2
        if len(items) == 1:  # no other fact to tell a guilty fact from a dead collector
            self._tell_outage()
            return []
        return await self._send_apart(items)

    async def _send_apart(self, items: Sequence[Item]) -> list[Item]:
        """Send fact by fact. A refused one is guilty if the collector takes another one, before it and after it."""
        taken: Item | None = None
        done: list[Item] = []
        early: list[Item] = []  # refused before any was taken
        for item in items:
            if await self._try([item]):
                taken = item
            elif taken is None:
                early.append(item)
                if len(early) == PROBES:
                    break
                continue
            elif not await self._judge(item, taken):
                return done
            done.append(item)
        if taken is None:
            self._tell_outage()
            return []
        for item in early:
            if not await self._judge(item, taken):
                break
            done.append(item)
        return done

    async def _judge(self, refused: Item, taken: Item) -> bool:
        """Return whether a refused fact is dealt with: taken after all, or set aside since the collector is up.

        That it is, is seen by what it took before, sent again; the ids are the same, which does no harm.
        """
        if not await self._try([taken], is_probe=True):
            self._tell_outage()
            return False
        if not await self._try([refused]):
            self._set_aside(refused)
        return True

    def _set_aside(self, item: Item) -> None:
        logger.error(
            "the collector refuses the spans of fact %s (%s in %s, %d bytes) and takes others: set aside (%s)",
            item.fact_id,
            item.entry_id,
            item.key,
            item.size,
            self._words.text,
            extra=_ids(item),
        )
        self._count(i.SPANS_FAILED, len(item.spans))

    async def _try(self, items: Sequence[Item], *, is_probe: bool = False) -> bool:
        spans = [span for item in items for span in item.spans]
        taken = await asyncio.get_running_loop().run_in_executor(self._thread, self._export, spans)
        if taken:
            self._count(i.SPANS_EXPORTED, 0 if is_probe else len(spans))
            self._own.counter(i.EXPORT_SUCCESS, (), 0).value = time.time_ns()
            if self.down_since is not None:
                logger.info("the collector takes spans again after %.1f s", time.monotonic() - self.down_since)
                self.down_since = None
        return taken

    def _export(self, spans: Sequence[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # an exporter may raise what it likes; a span that can't be encoded is a refusal
            self._words.text = f"{type(error).__name__}: {error}"
            return False

    def _tell_outage(self) -> None:
        if self.down_since is None:
            self.down_since = time.monotonic()
            logger.warning("the collector takes no spans (%s); they wait in the queue", self._words.text)

    def _count(self, instrument: i.Instrument, amount: int) -> None:
        self._own.counter(instrument, (), 0).add(amount, 0)

    def close(self) -> None:
        """Stop, also a try that sleeps."""
        self._exporter.shutdown()
        self._thread.shutdown(wait=True, cancel_futures=True)
