"""Writes `docs/metrics.md` from the instruments: `python -m agx_sidecar.catalogue > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterator

from . import instruments as i

_HEAD = f"""\
# Metrics

The sidecar serves these at `:9464/metrics`, as Prometheus text or as OpenMetrics, the latter with `trace_id` exemplars
on durations of sampled runs. This page is generated from `sidecar/agx_sidecar/instruments.py`.

- **Exact.** Sums are kept as integers (nanoseconds, tokens, nano-dollars); each fact counts once. A counter never falls
  and is never above what happened, whichever sidecar is killed, paused or replaced, as long as Redis keeps its data and
  facts are not trimmed unread, which `agx_queue_trimmed_total` counts.
- **Once per model request and tool call**, however it ended. A cancelled one has an empty `error_type`, which is no
  label at all to Prometheus. A tool call that was denied or deferred counts with the time it took to say so.
- **Born at zero.** The series of an agent, model or tool exist from its first fact on, as long as they leave half of
  their metric's room to what really happens. Idle for {i.SERIES_IDLE // 3600} h, they go, and return at zero.
- **Bounded.** Up to {i.LABEL_CAPS["scope"]} values of `scope`, `agent`, `model` and `tool`, {i.LABEL_CAP} of other
  open labels; up to {i.SERIES_BUDGET:,} series of a metric, {i.HISTOGRAM_BUDGET} label sets of a histogram. What is new
  past that counts under `{i.OTHER}` and in `agx_label_overflow_total`. No user, session or run is ever a label.
- **Tokens** come from each model response once. The five types of `agx_tokens_total` are disjoint and add up to what
  was used; the convention's histogram counts cached tokens into `input` and reasoning into `output`.
- **Cost** is what [genai-prices](https://github.com/pydantic/genai-prices) says about the model that answered, else
  about the one asked for; a model without a price counts in `agx_cost_unpriced_total` and is not guessed.
"""

_FLEET = """\
## The fleet's metrics

Only the leader shows these. To Prometheus two leaders are two instances: aggregate with `max without (instance, pod)`
before you sum. The relabelling in [`deploy/prometheus.yml`](../deploy/prometheus.yml) clears the target's labels of
these series, which makes a takeover invisible; the chart's monitors have it too.

"""

_REPLICA = """\
## Each replica's own metrics

Every replica shows these about itself; they begin at zero with its process.

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


def _table(instruments: list[i.Instrument]) -> Iterator[str]:
    yield "| metric | type | labels | what |"
    yield "|---|---|---|---|"
    for instrument in instruments:
        labels = ", ".join(f"`{label}`" for label in instrument.labels) or "-"
        yield f"| `{instrument.name}` | {instrument.kind} | {labels} | {instrument.help} |"


def _buckets(instruments: list[i.Instrument]) -> Iterator[str]:
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
