"""Renders series as Prometheus text or OpenMetrics, from a copy made at one moment, in any thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.samples import Sample as Line

from .series import Sample
from .table import NANO, Instrument

Snapshot = Mapping[Instrument, Sequence[Sample]]


def render(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Return the body and the content type that an `Accept` header asks for."""
    encoder, content_type = choose_encoder(accept)
    return encoder(_Families(snapshot)), content_type


class _Families(Collector):
    """Our samples as the families that prometheus_client writes; nothing has a `_created` series."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        for instrument in sorted(self._snapshot, key=lambda each: each.name):
            yield _family(instrument, self._snapshot[instrument])


def _family(instrument: Instrument, cells: Sequence[Sample]) -> Metric:
    name = instrument.name.removesuffix("_total") if instrument.kind == "counter" else instrument.name
    family = Metric(name, instrument.help, instrument.kind)
    for cell in cells:
        labels = dict(zip(instrument.labels, cell.labels, strict=True))
        if instrument.kind == "histogram":
            family.samples.extend(_histogram_samples(instrument, labels, cell))
        else:
            # True division of integers rounds once: the same integer is always the same float.
            family.samples.append(Line(instrument.name, labels, cell.value / instrument.scale))
    return family


def _histogram_samples(instrument: Instrument, labels: dict[str, str], cell: Sample) -> Iterator[Line]:
    cumulated = 0
    bounds = [*(repr(bound / instrument.scale) for bound in instrument.buckets), "+Inf"]
    for position, (bound, count) in enumerate(zip(bounds, cell.counts, strict=True)):
        cumulated += count
        exemplar = None
        if cell.exemplars is not None and (exemplar_of := cell.exemplars[position]) is not None:
            trace_id, value, at_ns = exemplar_of
            exemplar = Exemplar({"trace_id": trace_id}, value / instrument.scale, at_ns / NANO)
        yield Line(f"{instrument.name}_bucket", {**labels, "le": bound}, cumulated, None, exemplar)
    yield Line(f"{instrument.name}_count", labels, cumulated)
    yield Line(f"{instrument.name}_sum", labels, cell.value / instrument.scale)
