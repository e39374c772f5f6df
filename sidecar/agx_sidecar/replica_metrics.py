"""The series that each replica has of itself, beside the fleet's that only the leader exports."""

from __future__ import annotations

from agx import __version__

from .link import Link
from .metrics import instruments as i
from .metrics.exposition import Snapshot
from .metrics.series import Sample, Series
from .metrics.sink import MetricsSink


def zero_initialize(own: Series) -> None:
    """Create the counters of this replica at zero, so that their first increase is seen."""
    for instrument in i.CATALOGUE:
        if not instrument.fleet and instrument.kind == "counter":
            own.zero_initialize(instrument, [label.values for label in instrument.by])


def show_replica(own: Series, link: Link, metrics: MetricsSink | None) -> Snapshot:
    """Return this replica's series as they are now."""
    leads = metrics is not None and metrics.exporting
    return {
        **own.sample(),
        i.IS_LEADER: [Sample((), int(leads))],
        i.REDIS_UP: [Sample((), int(link.up))],
        i.BUILD_INFO: [Sample((__version__,), 1)],
    }
