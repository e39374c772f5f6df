"""GenAI metrics under each AGX_SEMCONV on one real Prometheus: our boards, and queries of other people's boards.

The same facts are counted once, and shown with the names of each mode at a time of its own: a query at that time sees
one mode. The samples are written into Prometheus' own files, so that nothing waits for a scrape.
"""

from __future__ import annotations

import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from ops.boards import BOARDS, ROOT, filled, panels
from support.made_facts import SERVICE, call, ended, node, started, tool

from agx.facts.reader import QueueEntry
from agx.facts.schema import encode
from agx.telemetry.conventions import Semconv
from agx_sidecar.metrics.exposition import render
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Series
from agx_sidecar.semconv import named
from dashboards.preview.stack import Stack, start_prometheus

pytestmark = pytest.mark.prometheus

PUBLIC = yaml.safe_load((Path(__file__).parent / "public_queries.yaml").read_text())
PAGE = (ROOT / "docs" / "other-boards.md").read_text()
ROUNDS, STEP = 6, 60  # of facts, and the seconds between two
APART = 3_600  # seconds between two modes

Ask = Callable[[Semconv, str], dict[frozenset[tuple[str, str]], float]]


def _rounds() -> Iterator[Fold]:
    """Yield one fold after each round of runs: two models and agents, a model and a tool that fail, priced and not."""
    fold, ids = Fold(Series(), Series(), {0: Position()}), count()
    for turn in range(ROUNDS):
        for agent, model in (("support", "gpt-4o-mini"), ("research", "in-house-7b")):
            run = f"{agent}-{turn}"
            failed = {"outcome": "failed", "error_type": "ModelHTTPError"}
            facts = [
                started(run, agent=agent),
                node(run, agent=agent, model=call(request_model=model, response_model=f"{model}-2026")),
                node(run, idx=1, agent=agent, model=call(request_model=model, response_model=None), **failed),
                tool(run, agent=agent),
                tool(run, "call-2", agent=agent, outcome="error", error_type="TimeoutError"),
                ended(run, agent=agent),
            ]
            fold.apply(0, [QueueEntry(f"1700000000000-{next(ids)}", encode(fact)) for fact in facts])
        yield fold


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask Prometheus at the end of a mode's time; the answer has each label set's value, if it is a number."""
    begin = int(time.time()) // APART * APART - 4 * APART
    at = {mode: begin + n * APART for n, mode in enumerate(get_args(Semconv))}
    lines = []
    for turn, fold in enumerate(_rounds()):
        for mode, start in at.items():
            body, _ = render(named(fold.series.sample(), mode), "text/plain")
            samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
            lines += [(start + turn * STEP, line) for line in samples]
    text = "".join(f"{line} {when}\n" for when, line in sorted(lines, key=lambda each: each[0]))
    with ExitStack() as cleanup:
        home = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="agx-public-")))
        (home / "samples").write_text(f"{text}# EOF\n")
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", home / "samples", home / "tsdb"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        stack = Stack("", (), start_prometheus(cleanup, home, {}))

        def query(mode: Semconv, expr: str) -> dict[frozenset[tuple[str, str]], float]:
            end = at[mode] + (ROUNDS - 1) * STEP
            found: list[dict[str, Any]] = stack.query_range(expr, end, end, 1)
            values = {frozenset(each["metric"].items()): float(each["values"][0][1]) for each in found}
            return {labels: value for labels, value in values.items() if math.isfinite(value)}

        yield query


def _as_shown(query: str) -> str:
    """Fill in a board's variables: all values, the last minutes, and the name of the service that it is made for."""
    for window in ("$__range", "$__rate_interval", "$__interval"):
        query = query.replace(window, "5m")
    return filled(query.replace('"$service"', f'"{SERVICE.name}"'))


def test_queries_of_public_boards_return_data_under_both(ask: Ask) -> None:
    works = [query for board in PUBLIC for query in board["works"]]
    fails = [query for board in PUBLIC for query in board["fails"]]
    silent = [query for query in works if not ask("both", _as_shown(query))]
    assert silent == []
    assert [query for query in fails if ask("both", _as_shown(query))] == [], (
        "these work: move them to the list of those that do"
    )
    assert len(PUBLIC) >= 12
    assert len(works) >= 45
    assert len(works) + len(fails) >= 59


def test_the_page_names_each_board_and_each_reason() -> None:
    for board in PUBLIC:
        assert board["board"] in PAGE
        works, total = len(board["works"]), len(board["works"]) + len(board["fails"])
        assert f"| {board['board']} | {works} of {total} |" in PAGE
        for reason in board["fails"].values():
            assert f"| {reason[0].upper()}{reason[1:]} |" in PAGE, reason


CHAT = 'gen_ai_operation_name=~"chat|generate_content|text_completion"'
# The scenarios of the conventions' migration guide that have a query for both (docs/gen-ai/non-normative/migration.md),
# with OLD and NEW for the first words of a metric.
MIGRATION = yaml.safe_load("""
- - sum by (gen_ai_request_model) (increase(OLD_duration_seconds_count{CHAT}[5m]))
  - sum by (gen_ai_request_model) (increase(NEW_duration_seconds_count[5m]))
- - histogram_quantile(0.95, sum by (le, gen_ai_request_model) (rate(OLD_duration_seconds_bucket{CHAT}[5m])))
  - histogram_quantile(0.95, sum by (le, gen_ai_request_model) (rate(NEW_duration_seconds_bucket[5m])))
- - >-
    sum by (gen_ai_request_model) (increase(OLD_duration_seconds_count{CHAT, error_type!=""}[5m]))
    / sum by (gen_ai_request_model) (increase(OLD_duration_seconds_count{CHAT}[5m]))
  - >-
    sum by (gen_ai_request_model) (increase(NEW_duration_seconds_count{error_type!=""}[5m]))
    / sum by (gen_ai_request_model) (increase(NEW_duration_seconds_count[5m]))
- - sum(increase(gen_ai_client_token_usage_sum{gen_ai_token_type="input"}[5m]))
  - sum(increase(NEW_usage_input_tokens_total[5m]))
- - sum(increase(gen_ai_client_token_usage_sum{gen_ai_token_type="output"}[5m]))
  - sum(increase(NEW_usage_output_tokens_total[5m]))
- - sum by (gen_ai_request_model) (increase(gen_ai_client_token_usage_sum[5m]))
  - >-
    sum by (gen_ai_request_model) (increase(NEW_usage_input_tokens_total[5m]))
    + sum by (gen_ai_request_model) (increase(NEW_usage_output_tokens_total[5m]))
- - sum by (le) (gen_ai_client_token_usage_bucket{gen_ai_token_type="input"})
  - sum by (le) (NEW_operation_input_tokens_bucket)
- - sum by (le) (OLD_time_to_first_chunk_seconds_bucket)
  - sum by (le) (NEW_time_to_first_chunk_seconds_bucket)
- - sum by (le) (OLD_time_per_output_chunk_seconds_bucket)
  - sum by (le) (NEW_time_per_output_chunk_seconds_bucket)
""")


def _written_out(query: str) -> str:
    query = query.replace("OLD", "gen_ai_client_operation").replace("CHAT", CHAT)
    return query.replace("NEW", "gen_ai_client_inference")


@pytest.mark.parametrize(("old", "new"), [tuple(map(_written_out, pair)) for pair in MIGRATION])
def test_old_and_new_names_have_equal_data(ask: Ask, old: str, new: str) -> None:
    data = ask("current", old)
    assert data
    assert ask("both", old) == ask("both", new) == ask("next", new) == data
    assert ask("current", new) == ask("next", old) == {}


def test_cached_tokens_are_counted_under_the_new_names_only(ask: Ask) -> None:
    cached, all_input = (f"gen_ai_client_inference_usage_{kind}_tokens_total" for kind in ("cache_read_input", "input"))
    ratio = f"sum(increase({cached}[5m])) / sum(increase({all_input}[5m]))"
    assert ask("current", ratio) == {}
    for mode in ("both", "next"):
        assert ask(mode, ratio) == {frozenset(): pytest.approx(0.3)}


def test_our_boards_show_the_same_in_every_mode(ask: Ask) -> None:
    queries = [
        target["expr"].replace("$__rate_interval", "5m").replace("$__range", "5m")
        for board in BOARDS.values()
        for panel in panels(board)
        for target in panel["targets"]
        if "gen_ai_" in target.get("expr", "")
    ]
    assert len(queries) > 15
    for query in map(filled, queries):
        data = ask("current", query)
        assert data, query
        assert ask("both", query) == ask("next", query) == data, query
