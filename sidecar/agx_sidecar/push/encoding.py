"""Turns series into OpenTelemetry's metric data: cumulative, with the start of the count. Pure, no I/O.

Metrics of the GenAI conventions get their dotted names back, and so do their labels. A collector that writes to
Prometheus makes the names of `/metrics` from them. Our own metrics have the same names in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from agx import __version__

from ..metrics.exposition import Snapshot
from ..metrics.series import Sample
from ..metrics.table import Instrument

_GENAI = "gen_ai_"
_SCOPE = InstrumentationScope("agx_sidecar", __version__)
_CUMULATIVE = AggregationTemporality.CUMULATIVE

# What belongs to one replica or its machine. The fleet's series go on under another one after a takeover.
_OF_REPLICA = ("service.instance.", "host.", "process.", "container.", "k8s.pod.", "k8s.node.", "k8s.container.")


def fleet_resource(own: Resource) -> Resource:
    """Return the resource of the fleet's series: a replica's without what names the replica."""
    return Resource({name: value for name, value in own.attributes.items() if not name.startswith(_OF_REPLICA)})


def describe(resource: Resource, snapshot: Snapshot, *, start_ns: int, now_ns: int) -> ResourceMetrics:
    """Return the series of one resource.

    Args:
        start_ns: when the counts began; never after `now_ns`. A constant start makes a cumulative series one series.
    """
    start_ns = min(start_ns, now_ns)
    metrics = [_metric(each, cells, start_ns, now_ns) for each, cells in snapshot.items() if cells]
    return ResourceMetrics(resource, [ScopeMetrics(_SCOPE, metrics, "")], "")


def join(parts: Sequence[ResourceMetrics]) -> MetricsData:
    """Return what one push sends."""
    return MetricsData(parts)


def _metric(instrument: Instrument, cells: Sequence[Sample], start_ns: int, now_ns: int) -> Metric:
    data: Sum | Gauge | Histogram
    if instrument.kind == "histogram":
        data = Histogram(list(_histogram_points(instrument, cells, start_ns, now_ns)), _CUMULATIVE)
    else:
        is_sum = instrument.kind == "counter"
        points = [
            NumberDataPoint(
                _attributes(instrument, cell), start_ns if is_sum else 0, now_ns, _in_unit(instrument, cell)
            )
            for cell in cells
        ]
        data = Sum(points, _CUMULATIVE, is_monotonic=True) if is_sum else Gauge(points)
    return Metric(instrument.otel_name or instrument.name, instrument.help, _unit(instrument), data)


def _unit(instrument: Instrument) -> str:
    # A collector that writes to Prometheus appends `s` and `USD` to the name, and leaves out what is in braces.
    if instrument.name.endswith("_seconds"):
        return "s"
    if instrument.name.endswith("_USD"):
        return "USD"
    return "{token}" if "token" in instrument.otel_name else ""


def _histogram_points(
    instrument: Instrument, cells: Sequence[Sample], start_ns: int, now_ns: int
) -> Iterator[HistogramDataPoint]:
    bounds = [bound / instrument.scale for bound in instrument.buckets]
    for cell in cells:
        yield HistogramDataPoint(
            attributes=_attributes(instrument, cell),
            start_time_unix_nano=start_ns,
            time_unix_nano=now_ns,
            count=sum(cell.counts),
            sum=_in_unit(instrument, cell),
            bucket_counts=cell.counts,
            explicit_bounds=bounds,
            min=None,  # type: ignore[arg-type] # optional in OTLP: the smallest since the start is not known
            max=None,  # type: ignore[arg-type]
        )


def _in_unit(instrument: Instrument, cell: Sample) -> int | float:
    # OTLP's integers have 64 bits. True division of integers rounds once: the same integer is always the same float.
    return cell.value if instrument.scale == 1 and cell.value < 2**63 else cell.value / instrument.scale


def _attributes(instrument: Instrument, cell: Sample) -> dict[str, str]:
    pairs = zip(instrument.labels, cell.labels, strict=True)
    # An empty label is no label, as in Prometheus.
    return {_dotted(name) if instrument.otel_name else name: value for name, value in pairs if value}


def _dotted(label: str) -> str:
    prefix, rest = (_GENAI, label[len(_GENAI) :]) if label.startswith(_GENAI) else ("", label)
    return prefix.rstrip("_") + "." * bool(prefix) + rest.replace("_", ".")
