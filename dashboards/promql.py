"""PromQL for the boards: every fleet series is aggregated over the sidecar's replicas before it is summed.

Only the leading replica exports the fleet's series. Without the relabelling of contract section 7 a takeover makes two
instances of one series, and a plain `sum` would double it; hence `max without (instance, pod)` in every function here
but `own()`, whose metrics belong to each replica.
"""

from __future__ import annotations

from agx_sidecar.metrics.instruments import OPERATION_DURATION
from agx_sidecar.semconv import RELEASED

FLEET = "max without (instance, pod)"
INTERVAL = "$__rate_interval"
RANGE = "$__range"

# The board's variables as matchers; the names are the labels of contract section 6.
SCOPE = 'scope=~"$scope"'
AGENT = 'agent=~"$agent"'
SERVICE = 'service=~"$service"'
MODEL = 'model=~"$model"'
GENAI_AGENT = 'gen_ai_agent_name=~"$agent"'
GENAI_MODEL = 'gen_ai_request_model=~"$model"'
GENAI_SERVICE = 'service_name=~"$service"'
# Some metrics have another name under AGX_SEMCONV=next. Where both are there, their series are equal: `or` takes one.
_NEXT_NAMES = {name.source.name: name.target.name for name in RELEASED if not name.token_type}
_MODEL_REQUEST = 'gen_ai_operation_name="chat"'  # under AGX_SEMCONV=both tool calls are operations too
INSTALLATION = 'cluster=~"$cluster", namespace=~"$namespace", job=~"$job"'


def select(metric: str, *matchers: str) -> str:
    """Return a selector of a metric within the chosen installation."""
    return f"{metric}{{{', '.join((INSTALLATION, *matchers))}}}"


def total(metric: str, *matchers: str, by: str = "") -> str:
    """Return the sum of a fleet gauge."""
    return f"{_sum(by)} ({FLEET} ({select(metric, *matchers)}))"


def highest(metric: str, *matchers: str, by: str = "") -> str:
    """Return the maximum of a gauge over everything but `by`."""
    return f"max{_by(by)} ({select(metric, *matchers)})"


def rate(metric: str, *matchers: str, by: str = "", offset: str = "") -> str:
    """Return a counter's increase per second, summed; `offset` (`1d`) is how long ago."""
    return f"{_sum(by)} ({_over_window('rate', metric, matchers, INTERVAL, offset)})"


def increase(metric: str, *matchers: str, by: str = "", window: str = RANGE) -> str:
    """Return a counter's increase over the window, summed."""
    return f"{_sum(by)} ({_over_window('increase', metric, matchers, window)})"


def quantile(q: float, histogram: str, *matchers: str, by: str = "", window: str = INTERVAL, offset: str = "") -> str:
    """Return a quantile of a histogram; `offset` (`1d`) is how long ago."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate_buckets(histogram, *matchers, by=labels, window=window, offset=offset)})"


def rate_buckets(histogram: str, *matchers: str, by: str = "le", window: str = INTERVAL, offset: str = "") -> str:
    """Return the rate of a histogram's buckets."""
    return f"sum by ({by}) ({_over_window('rate', f'{histogram}_bucket', matchers, window, offset)})"


def either(*queries: str) -> str:
    """Return the series of the first query, and of the others those with labels of their own."""
    return " or ".join(f"({query})" for query in queries)


def own(metric: str, *matchers: str, by: str = "", per_second: bool = False) -> str:
    """Return a sum over the replicas' own series, each of which counts what that replica did."""
    selected = select(metric, *matchers)
    return f"{_sum(by)} ({f'rate({selected}[{INTERVAL}])' if per_second else selected})"


def ratio(part: str, whole: str) -> str:
    """Return a share; nothing, rather than a NaN, where there is no whole."""
    return f"({part}) / ({whole} > 0)"


def threshold(name: str) -> str:
    """Return an alert's threshold (rules/agx.rules.yaml) as a line."""
    return f'max(agx:threshold{{name="{name}"}})'


def _over_window(function: str, metric: str, matchers: tuple[str, ...], window: str, offset: str = "") -> str:
    shifted = f" offset {offset}" if offset else ""
    if metric.startswith(OPERATION_DURATION.name):
        matchers = (*matchers, _MODEL_REQUEST)
    names = [metric]
    names += [metric.replace(old, new) for old, new in _NEXT_NAMES.items() if metric.startswith(old)]
    return " or ".join(f"{FLEET} ({function}({select(name, *matchers)}[{window}]{shifted}))" for name in names)


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _sum(labels: str) -> str:
    return f"sum{_by(labels)}"
