"""Writes `docs/metrics.md` from the table of metrics: `python -m agx_sidecar.metrics.catalogue > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterator

from . import instruments as i
from . import table as t
from .series import LABEL_LENGTH
from .table import HISTOGRAM_BUDGET, LABEL_CAP, SERIES_BUDGET, Instrument

_HEAD = f"""\
# Metrics

The sidecar serves these metrics at `:9464/metrics`, as Prometheus text or as OpenMetrics. OpenMetrics has `trace_id`
exemplars on durations of sampled runs. This page is generated from `sidecar/agx_sidecar/metrics/instruments.py`.

- **Exact.** Sums are kept as integers (nanoseconds, tokens, nano-dollars), and each fact counts once. A counter never
  falls and never exceeds what happened, whichever sidecar is killed, paused or replaced, as long as Redis keeps its
  data and facts are not trimmed unread, which `agx_queue_trimmed_total` counts.
- **One observation per model request and tool call**, however it ended. A cancelled one has an empty `error_type`,
  which Prometheus treats as no label. A tool call that was denied or deferred counts with the time until that decision.
- **Initialized at zero.** The series of an agent, model or tool exist from its first fact on, so `increase()` sees the
  first event. They take at most half of the room of their metric. A series that is idle for {t.SERIES_IDLE // 3600} h
  is removed, and returns at zero.
- **Bounded.** There are at most {t.WIDE_CAP} values of `scope`, `agent`, `model` and `tool`, {LABEL_CAP} of each other
  open label, {SERIES_BUDGET:,} series of a metric and {HISTOGRAM_BUDGET} label sets of a histogram. New values beyond
  that count under `{t.OTHER}` and in `agx_label_overflow_total`. Values are cut at {LABEL_LENGTH} characters. A tool
  that the agent does not have is `{t.UNKNOWN_TOOL}`. No user, session or run is ever a label.
- **Kept through upgrades.** The leader writes what was counted to Redis, and its successor continues from there, also
  after an upgrade. If a label is added to a metric, its old series have the empty value. If buckets change, that
  metric restarts. No other metric is affected.
- **Tokens** come from each model response once. The five types of `agx_tokens_total` are disjoint and add up to the
  tokens used. The convention's histogram counts cached tokens into `input` and reasoning tokens into `output`.
- **Cost** is what pydantic-ai or the provider reported for the response, else what
  [genai-prices](https://github.com/pydantic/genai-prices) has for the model that answered, else for the one that was
  requested. A response without any price counts in `agx_cost_unpriced_total`.
- **GenAI names in transition.** `AGX_SEMCONV` shows names of the conventions' next release, and names that public
  boards use: see [GenAI boards of others](other-boards.md). By default `gen_ai_client_inference_*` and
  `gen_ai_usage_cost_USD` are not shown.
"""

_FLEET = """\
## The fleet's metrics

Only the leader exports these. For Prometheus two leaders are two instances: aggregate with
`max without (instance, pod)` before you sum. The relabelling in [`deploy/prometheus.yml`](../deploy/prometheus.yml)
removes the target's labels from these series, so that a takeover does not change them. The chart's monitors do so too.

"""

_REPLICA = """\
## Each replica's own metrics

Every replica exports these about itself; they begin at zero with its process.

"""


def write_catalogue() -> str:
    """Return the page."""
    fleet = [instrument for instrument in i.CATALOGUE if instrument.fleet]
    own = [instrument for instrument in i.CATALOGUE if not instrument.fleet]
    return "\n".join(
        [
            _HEAD,
            _FLEET + "\n".join(_table(fleet)) + "\n",
            _REPLICA + "\n".join(_table(own)) + "\n",
            "## Buckets\n\n" + "\n".join(_buckets(fleet)) + "\n",
        ]
    ).rstrip("\n")


def _table(instruments: list[Instrument]) -> Iterator[str]:
    yield "| metric | type | labels | what |"
    yield "|---|---|---|---|"
    for instrument in instruments:
        labels = ", ".join(f"`{label}`" for label in instrument.labels) or "-"
        yield f"| `{instrument.name}` | {instrument.kind} | {labels} | {instrument.help} |"


def _buckets(instruments: list[Instrument]) -> Iterator[str]:
    by_bounds: dict[tuple[float, ...], list[str]] = {}
    for instrument in instruments:
        if instrument.buckets:
            bounds = tuple(bound / instrument.scale for bound in instrument.buckets)
            by_bounds.setdefault(bounds, []).append(instrument.name)
    yield "| upper bounds | metrics |"
    yield "|---|---|"
    for bounds, names in by_bounds.items():
        yield f"| {', '.join(f'{bound:.10g}' for bound in bounds)} | {', '.join(f'`{name}`' for name in names)} |"


def main() -> None:
    """Print the page."""
    print(write_catalogue())


if __name__ == "__main__":
    main()
