"""The boards as they are committed: complete, linked, laid out, and naming only what the sidecar has."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
from ops.boards import BOARDS, BY_NAME, MARKS, ROOT, metrics_in, panels, rules, targets

from dashboards.layout import UNITS

ALL_PANELS = [(name, panel) for name, board in BOARDS.items() for panel in panels(board)]
RUNBOOKS = "https://github.com/opale/pydantic-ai-stream/blob/main/docs/runbooks.md"


def test_the_committed_boards_are_what_the_code_makes() -> None:
    subprocess.run([sys.executable, "-m", "dashboards", "--check"], cwd=ROOT, check=True, timeout=60)


def test_boards_have_ids_of_their_own() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS) == 3
    for name, board in BOARDS.items():
        headings = [panel for panel in board["panels"] if panel["type"] == "row"]
        ids = [panel["id"] for panel in (*headings, *panels(board))]
        assert len(ids) == len(set(ids)), name


def test_panels_do_not_overlap_and_stay_on_the_grid() -> None:
    for name, board in BOARDS.items():
        # A folded row's panels take no room until it is opened, and then below it.
        for group in (board["panels"], *(row["panels"] for row in board["panels"] if row["type"] == "row")):
            taken: dict[tuple[int, int], str] = {}
            for panel in group:
                place = panel["gridPos"]
                assert place["w"] > 0
                assert place["x"] + place["w"] <= 24
                for cell in itertools.product(
                    range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
                ):
                    assert cell not in taken, f"{name}: {panel['title']} covers {taken.get(cell)}"
                    taken[cell] = panel["title"]


def test_only_the_first_rows_are_open() -> None:
    for name, board in BOARDS.items():
        folded = [row["collapsed"] for row in board["panels"] if row["type"] == "row"]
        assert folded == sorted(folded), name  # a folded row above an open one would hide nothing
        assert folded.count(False) <= 3
        assert folded[-1]
        for row in board["panels"]:
            assert row["type"] != "row" or bool(row["panels"]) == row["collapsed"]


@pytest.mark.parametrize(("board", "panel"), ALL_PANELS, ids=[f"{b}-{p['title']}" for b, p in ALL_PANELS])
def test_every_panel_has_a_unit_advice_and_a_runbook(board: str, panel: dict) -> None:  # type: ignore[type-arg]
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.removeprefix("## ").lower()).replace(" ", "-")
        for line in (ROOT / "docs" / "runbooks.md").read_text().splitlines()
        if line.startswith("## ")
    }
    unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
    assert re.findall(r" \[(.+)\]", panel["title"]) == ([unit] if unit else [])
    assert len(panel["description"]) > 30
    (link,) = panel["links"]
    page, _, anchor = link["url"].partition("#")
    assert page == RUNBOOKS
    assert anchor in headings
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references))
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert target["datasource"] in (
            {"type": "prometheus", "uid": "${datasource}"},
            {"type": "tempo", "uid": "${traces}"},
        )


def test_every_board_asks_for_its_data_sources_and_offers_the_choices_it_uses() -> None:
    for name, board in BOARDS.items():
        offered = {variable["name"] for variable in board["templating"]["list"]}
        text = str(board["panels"])
        used = set(re.findall(r"\$\{?([a-z]+)\b", text)) - {"__"}
        assert {"datasource", "traces", "cluster", "namespace", "job"} <= offered, name
        assert used - {"__rate_interval", "__range", "__field", "__from", "__to", "__data"} <= offered, name
        assert offered - {"traces"} <= used, f"{name} offers what no query reads"


def test_every_query_obeys_every_variable_or_the_title_says_that_it_cannot() -> None:
    for name, board in BOARDS.items():
        shown = {v["name"] for v in board["templating"]["list"] if v["type"] == "query"}
        for panel in panels(board):
            title, _, suffix = panel["title"].partition(" (all")
            said = {part.removesuffix("s") for part in suffix.strip(" )").split(", ") if part}
            if suffix == ")":
                said = shown - {"cluster", "namespace", "job"}
            if panel["datasource"]["type"] == "tempo":
                (target,) = panel["targets"]
                obeyed = set(re.findall(r'=~ "\$\{(\w+):pipe\}"', target["query"]))
                assert shown - obeyed == said == {"cluster", "namespace", "job"}, title  # not in traces
                continue
            for target in panel["targets"]:
                if target["legendFormat"] == "threshold":
                    continue  # one line for all
                for metric, matchers in re.findall(r"\b(agx_\w+|gen_ai_\w+|ALERTS)\{([^}]*)\}", target["expr"]):
                    obeyed = set(re.findall(r'(?<!\w)\w+=~"\$(\w+)"', matchers))
                    assert shown - obeyed <= said, f"{name}: {title}: {metric}"
            assert not said & {"cluster", "namespace", "job"}, f"{name}: {title}"


def test_a_panel_obeys_each_variable_that_its_metric_has_a_label_for() -> None:
    labels = {"service": {"service", "service_name"}, "agent": {"agent", "gen_ai_agent_name"}, "scope": {"scope"}}
    for name, board in BOARDS.items():
        shown = {v["name"] for v in board["templating"]["list"]} & labels.keys()
        for panel in panels(board):
            for target in panel["targets"]:
                for metric, matchers in re.findall(r"\b((?:agx|gen_ai)_\w+)\{([^}]*)\}", target.get("expr", "")):
                    (known,) = metrics_in(metric)
                    for variable in shown:
                        if labels[variable] & set(BY_NAME[known].labels):
                            assert f'=~"${variable}"' in matchers, f"{name}: {panel['title']}: {metric}, {variable}"


def test_each_board_marks_deployments_takeovers_and_alerts() -> None:
    for board in BOARDS.values():
        marks = {mark["name"]: mark for mark in board["annotations"]["list"]}
        assert set(marks) == {"Service deployed", "Sidecar deployed", "Takeover", "Alerts"}
        for mark in marks.values():
            selectors = re.findall(r"\w+\{([^}]*)\}", mark["target"]["expr"])
            assert selectors
            assert all('cluster=~"$cluster", namespace=~"$namespace", job=~"$job"' in each for each in selectors)
            assert set(re.findall(r"\{\{(\w+)\}\}", mark["titleFormat"])) <= {
                "service", "version", "pod", "instance", "alertname",
            }  # fmt: skip


def test_a_failed_run_leads_to_its_page_and_its_trace() -> None:
    (panel,) = (panel for panel in panels(BOARDS["agx-agents"]) if panel["datasource"]["type"] == "tempo")
    (override,) = panel["fieldConfig"]["overrides"]
    console, trace = override["properties"][0]["value"]
    assert console["url"] == (
        'http://127.0.0.1:9465/run?scope=${__data.fields["agx.scope.id"]}&run=${__data.fields["agx.run.id"]}'
    )
    assert "${__data.fields.traceIdHidden}" in trace["url"]
    assert "${traces}" in trace["url"]


def test_the_choices_follow_from_metrics_that_there_are() -> None:
    queries = [
        variable["query"]
        for board in BOARDS.values()
        for variable in board["templating"]["list"]
        if variable["type"] == "query"
    ]
    for query in queries:
        metric, label = re.fullmatch(r"label_values\(([a-z_]+)(?:\{.*\})?, (\w+)\)", query).groups()  # type: ignore[union-attr]
        instrument = BY_NAME[metric.removesuffix("_count")]
        assert label in (*instrument.labels, "cluster", "namespace", "job")


def test_every_metric_that_a_board_or_rule_names_is_in_the_catalogue() -> None:
    named = {metric for target in targets() for metric in metrics_in(target.expr)}
    named |= {metric for mark in MARKS for metric in metrics_in(mark["target"]["expr"])}
    named |= {metric for rule in rules() for metric in metrics_in(rule["expr"])}
    assert named - BY_NAME.keys() == set()
    # And the other way round: what nobody looks at should not be measured, or be shown.
    unseen = BY_NAME.keys() - named - {name for name in BY_NAME if re.match("gen_ai_(.*_)?usage_", name)}
    assert unseen == {"agx_runs_started_total", "gen_ai_invoke_agent_duration_seconds"}


def test_fleet_series_are_aggregated_over_replicas_before_they_are_summed() -> None:
    first = re.compile(
        r"(max without \(instance, pod\) \((?:(?:rate|increase|last_over_time)\()?"
        r"|(?:max|group)(?: by \([^)]*\))? \((?:last_over_time\()?)$"
    )
    for where, expr in [(t.name, t.expr) for t in targets()] + [(str(r), r["expr"]) for r in rules()]:
        text = re.sub(r"\b(by|on) \([^)]*\)", r"\1 (labels)", re.sub(r"\s+", " ", expr))
        for found in re.finditer(r"\b(?:agx|gen_ai)_[a-z0-9_]+(?=[{\[)])", text):
            (metric,) = metrics_in(found[0])
            before = text[: found.start()].replace("( ", "(")
            if BY_NAME[metric].fleet:
                assert first.search(before), f"{where}: {text}"


def test_labels_in_queries_are_labels_of_their_metric() -> None:
    for target in targets():
        for metric, matchers in re.findall(r"\b((?:agx|gen_ai)_[a-z0-9_]+)\{([^}]*)\}", target.expr):
            (name,) = metrics_in(metric)
            used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", re.sub(r'"[^"]*"', '""', matchers)))
            assert used <= {*BY_NAME[name].labels, "cluster", "namespace", "job", "le"}, target.name


def test_exemplars_are_asked_for_where_there_are_durations() -> None:
    shown = {target["expr"] for _, panel in ALL_PANELS for target in panel["targets"] if target.get("exemplar")}
    for metric in (
        "agx_run_duration_seconds",
        "gen_ai_client_operation_duration_seconds",
        "agx_cancel_latency_seconds",
    ):
        assert any(f"{metric}_bucket" in expr for expr in shown)
