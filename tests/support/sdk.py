"""A service's OpenTelemetry SDK, installed for one test and taken away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler


class SpanLedger(SpanProcessor):
    """Keeps what was started and what was ended, so that neither a leak nor a second end goes unseen."""

    def __init__(self) -> None:
        self.started: list[Span] = []
        self.ended: list[ReadableSpan] = []

    def on_start(self, span: Span, parent_context: object = None) -> None:
        self.started.append(span)

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)

    def named(self, prefix: str) -> list[ReadableSpan]:
        return [span for span in self.ended if span.name.startswith(prefix)]

    def one(self, prefix: str) -> ReadableSpan:
        found = self.named(prefix)
        assert len(found) == 1, [span.name for span in self.ended]
        return found[0]

    def parent_name(self, span: ReadableSpan) -> str | None:
        """The name of a span's parent, None at the root."""
        if span.parent is None:
            return None
        by_id = {each.context.span_id: each.name for each in self.ended if each.context is not None}
        return by_id.get(span.parent.span_id, "not exported")


@contextmanager
def installed_sdk(sampler: Sampler = ALWAYS_ON) -> Iterator[SpanLedger]:
    """Make an SDK the global provider within the block."""
    ledger = SpanLedger()
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(ledger)
    with patch("opentelemetry.trace._TRACER_PROVIDER", provider):
        yield ledger
