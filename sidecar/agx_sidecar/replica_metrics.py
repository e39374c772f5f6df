"""The series that each replica has of itself, beside the fleet's that only the leader exports."""

from __future__ import annotations

from agx import __version__

from .link import Link
from .metrics import instruments as i
from .metrics.exposition import Snapshot
from .metrics.series import Series, Shown
from .metrics.sink import MetricsSink


def zero_initialize(own: Series) -> None:
    """Create the counters of this replica at zero, so that their first increase is seen."""
    for instrument in (i.MALFORMED, i.SPANS_EXPORTED, i.SPANS_FAILED):
        own.bear(instrument, (), 0)
    for kind in ("run.start", "node", "tool", "run.end", "process", "repeat", "unknown"):
        own.bear(i.FACTS, (kind,), 0)
    for label in ("scope", "agent", "model", "tool"):
        own.bear(i.LABEL_OVERFLOW, (label,), 0)


def show_replica(own: Series, link: Link, metrics: MetricsSink | None) -> Snapshot:
    """Return this replica's series as they are now."""
    leads = metrics is not None and metrics.exporting
    return {
        **own.show(),
        i.IS_LEADER: [Shown((), int(leads))],
        i.REDIS_UP: [Shown((), int(link.up))],
        i.BUILD_INFO: [Shown((__version__,), 1)],
    }
