"""The index page: tool calls that wait, live runs, then the lost and failed ones, then the rest."""

from __future__ import annotations

from typing import get_args
from urllib.parse import urlencode

from agx.facts.schema import ERROR_OUTCOMES, Outcome, RunEnded
from agx.fleet.fleet import LiveRun
from agx.stream.entry import StreamEntry

from .formatting import ago, badge, clock, duration, error_name, run_url, session_name
from .html import Html, h
from .overview import Overview, Query
from .waiting_calls import waiting_view

_LISTS = {
    "bad": tuple(reversed(ERROR_OUTCOMES)),
    "good": tuple(name for name in reversed(get_args(Outcome)) if name not in ERROR_OUTCOMES),
}


def index_view(overview: Overview, *, can_write: bool, content: bool) -> Html:
    """Return the part of the page that is refreshed."""
    query = overview.query
    return h(
        "main",
        h("h1", "Runs"),
        _search(query),
        _tiles(overview),
        _range(overview),
        waiting_view(overview.waiting, overview.now_ms, can_write=can_write, content=content),
        _live(overview),
        _ended("Lost and failed", "bad", overview, overview.bad),
        _ended("Cancelled and completed", "good", overview, overview.good),
        id="view",
        data_every=2000,
        data_title=f"{overview.live} live",
    )


def _search(query: Query) -> Html:
    field = h("input", id="q", name="q", type="search", value=query.text, maxlength=200, autocomplete="off")
    label = h("label", "Scope, user, session, run or agent", for_="q")
    depth = h("input", type="hidden", name="depth", value=query.depth)
    return h("form", label, field, depth, h("button", "Find"), method="get", action="/", role="search", class_="find")


def _tiles(overview: Overview) -> Html:
    tiles = [_tile("live", "live", overview.live)]
    for key, names in _LISTS.items():
        tiles += [_tile(key, name, overview.outcomes.get(name, 0)) for name in names]
    return h("ul", tiles, class_="tiles", aria_label="Counts")


def _tile(key: str, name: str, count: int) -> Html:
    link = h("a", h("strong", f"{count:,}"), " ", badge(name), href=f"#h-{key}")
    return h("li", link, class_=f"tile {name}" if count else "tile none")


def _live(overview: Overview) -> Html:
    rows = [_live_row(overview, run, last) for run, last in overview.shown]
    if not rows:
        return _section("live", "Live", 0, h("p", _nothing(overview), class_="quiet"))
    heads = ("Agent", "Session", "Running", "Doing", "Last event")
    return _section("live", "Live", overview.live, _table("Live runs, longest first", heads, rows), _pages(overview))


def _nothing(overview: Overview) -> str:
    if not overview.has_services:
        return "No service has run on this prefix yet: check AGX_KEY_PREFIX, or start a run."
    return "No live run matches." if overview.query.text else "No run is live."


def _live_row(overview: Overview, run: LiveRun, last: StreamEntry | None) -> Html:
    session, now = run.session, overview.now_ms
    url = run_url(session.scope, run.run_id, session.user, session.session, run.began_ms or 0)
    name = run.agent or ("opened by hand" if run.manual else "unknown")
    began = ago(now - run.began_ms) if run.began_ms else "-"
    state = "recovering" if run.is_recovering(last, now) else "dead" if run.is_dead(now) else ""
    return h(
        "tr",
        h("th", h("a", name, href=url, id=f"a-{run.run_id}"), scope="row"),
        h("td", session_name(session.scope, session.user, session.session)),
        h("td", began, class_="number"),
        h("td", badge(state) if state else _doing(run, last)),
        h("td", f"{ago(now - last.id[0])} ago" if last else "-", class_="number extra"),
        id=f"r-{run.run_id}",
    )


def _doing(run: LiveRun, last: StreamEntry | None) -> Html:
    if run.lease == "cancelling":
        return badge("cancelling")
    body = last.body if last is not None else {}
    what, kind = body.get("event"), body.get("part_kind")
    doing = "starting"
    if last is not None and last.type == "end":
        doing = "saving"
    elif kind == "tool-call":
        doing = f"calling {body.get('tool_name')}"
    elif kind == "tool-return":
        doing = f"got {body.get('tool_name')}"
    elif what == "llm-begin":
        doing = f"waiting for {body.get('model', 'the model')}"
    elif what == "llm-end":
        doing = "working"
    elif kind in ("text", "thinking"):
        doing = "thinking" if kind == "thinking" else "writing"
    if last is not None and last.is_from_sub_agent:
        doing = f"{body.get('agent')}: {doing}"
    return h("span", doing, class_="doing")


def _ended(title: str, key: str, overview: Overview, ended: tuple[RunEnded, ...]) -> Html:
    count = sum(overview.outcomes.get(name, 0) for name in _LISTS[key])
    if not ended:
        return _section(key, title, 0, h("p", "None.", class_="quiet"))
    heads = ("Agent", "Session", "Outcome", "Why", "Took", "Model calls", "Tool calls", "Ended")
    rows = [_ended_row(overview.now_ms, fact) for fact in ended]
    return _section(key, title, count, _table(f"{title}, newest first", heads, rows))


def _ended_row(now_ms: int, fact: RunEnded) -> Html:
    url = run_url(fact.scope, fact.run_id, fact.user, fact.session, fact.start_ns // 1_000_000)
    ended_ms = fact.end_ms or fact.end_ns // 1_000_000
    return h(
        "tr",
        h("th", h("a", fact.agent, href=url, id=f"a-{fact.run_id}"), scope="row"),
        h("td", session_name(fact.scope, fact.user, fact.session)),
        h("td", badge(fact.outcome)),
        h("td", fact.reason or error_name(fact.outcome, fact.error_type) or "", class_="extra"),
        h("td", duration(fact.end_ns - fact.start_ns), class_="number"),
        h("td", fact.model_calls, class_="number extra"),
        h("td", fact.tool_calls, class_="number extra"),
        h("td", f"{ago(now_ms - ended_ms)} ago", class_="number", title=clock(ended_ms)),
        id=f"r-{fact.run_id}",
    )


def _section(key: str, title: str, count: int, *content: Html | None) -> Html:
    heading = h("h2", title, " ", h("span", f"{count:,}", class_="count"), id=f"h-{key}")
    return h("section", heading, *content)


def _table(caption: str, heads: tuple[str, ...], rows: list[Html]) -> Html:
    head = h("thead", h("tr", [h("th", name, scope="col", class_=_class_of(name)) for name in heads]))
    table = h("table", h("caption", caption, class_="unseen"), head, h("tbody", rows))
    # It scrolls by itself on a narrow screen, so the keyboard has to reach it.
    return h("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


_NUMBERS = ("Running", "Last event", "Took", "Model calls", "Tool calls", "Ended")
_EXTRAS = ("Last event", "Model calls", "Tool calls", "Why")  # not on a narrow screen


def _class_of(head: str) -> str | None:
    classes = [name for name, heads in (("number", _NUMBERS), ("extra", _EXTRAS)) if head in heads]
    return " ".join(classes) or None


def _pages(overview: Overview) -> Html | None:
    if overview.pages == 1:
        return None
    query, at = overview.query, min(overview.query.page, overview.pages)
    back = h("a", "← Before", href=_url(query, page=at - 1), rel="prev", id="before") if at > 1 else None
    on = h("a", "Next →", href=_url(query, page=at + 1), rel="next", id="next") if at < overview.pages else None
    here = h("span", f"Page {at:,} of {overview.pages:,}", aria_current="page")
    return h("nav", back, here, on, class_="pages", aria_label="Pages of live runs")


def _range(overview: Overview) -> Html:
    if not overview.since_ms:
        return h("p", "Shows every live run, and every ended run that Redis still has.", class_="quiet")
    text = f"Shows every live run, and the runs that ended in the last {ago(overview.now_ms - overview.since_ms)}. "
    further = None
    if overview.query.depth < 3:
        further = h("a", "Look further back", href=_url(overview.query, depth=overview.query.depth + 1))
    return h("p", text, further, class_="quiet")


def _url(query: Query, page: int = 1, depth: int | None = None) -> str:
    return "/?" + urlencode({"q": query.text, "page": page, "depth": depth or query.depth})
