"""A run's page: its state, the waterfall of its nodes, tools and tokens, its events, and the cancel button."""

from __future__ import annotations

from urllib.parse import urlencode

from agx.facts.schema import NodeEnded, RunEnded

from ..metrics.values import nano_dollars
from .conversation import conversation_view
from .event_log import (
    LINES,
    Line,
    sampled_lines,
    write_lines,
)
from .formatting import (
    badge,
    clock,
    dollars,
    duration,
    error_name,
    outcome_text,
    session_name,
    tick,
)
from .html import Html, h
from .run_history import RunHistory, RunPlace
from .waterfall import Bar, Waterfall, draw_waterfall

_WIDE = 1_000  # units of the time axis
_TICKS = 4


def run_view(
    history: RunHistory, *, can_cancel: bool, content: bool, conversation: list[tuple[str, str]] | None = None
) -> Html:
    """Return the part of the page that is refreshed; `content` shows the texts of users, models and tools."""
    place, ended = history.place, history.ended
    fall = draw_waterfall(history)
    agent = fall.bars[0].name if fall.bars and fall.bars[0].kind == "run" else "unknown agent"
    state = history.state
    cancel = _cancel(history, can_cancel=can_cancel) if history.is_live else None
    return h(
        "main",
        h("p", h("a", "All runs", href="/"), class_="back"),
        h("div", h("h1", agent, " ", badge(state)), cancel, class_="head"),
        h(
            "p",
            session_name(place.scope, place.user, place.session),
            " · run ",
            h("code", place.run_id),
            _others(place),
        ),
        _facts(history, fall, ended, content=content),
        _waterfall(fall, is_live=history.is_live),
        _tokens(fall),
        _events(history, ended, content=content),
        conversation_view(conversation or []),
        id="view",
        data_every=1000 if history.is_live else 0,
        data_title=f"{agent} · {outcome_text(state)}",
        data_state=f"The run is {outcome_text(state)}",
    )


def unknown_view() -> Html:
    """Return the view of a run of which nothing is stored."""
    return h(
        "main",
        h("p", h("a", "All runs", href="/"), class_="back"),
        h("h1", "Nothing is stored of this run"),
        h("p", "It has no lease, its stream has expired, and its facts are no longer in the queue."),
        id="view",
        data_every=0,
        data_title="unknown run",
    )


def _facts(history: RunHistory, fall: Waterfall, ended: RunEnded | None, *, content: bool) -> Html:
    fact = ended or history.started
    service = fact.service if fact is not None else None
    last = fall.tokens[-1] if fall.tokens else None
    rows = [
        ("Began", clock(fall.start_ns // 1_000_000)),
        ("Took" if ended else "Running for", duration(fall.end_ns - fall.start_ns)),
        ("Tokens", f"{last.input:,} in, {last.output:,} out" if last else "none reported yet"),
        ("Cost", _cost(history)),
        ("Why", (ended.reason or error_name(ended.outcome, ended.error_type) or "") if ended else ""),
        ("Where", (ended.stage or "").replace("_", " ") if ended and ended.outcome != "completed" else ""),
        ("Error", (ended.error_message or "") if ended and content else ""),
        ("Service", " ".join(part for part in (service.name, service.version) if part) if service else ""),
        ("Trace", fact.trace.trace_id if fact is not None else ""),
        ("Note", "its process died; a sidecar finalized the run" if ended and ended.partial else ""),
    ]
    return h("dl", [h("div", h("dt", name), h("dd", text)) for name, text in rows if text], class_="facts")


def _others(place: RunPlace) -> Html | None:
    """Return a link to the runs of the same session."""
    if place.user is None or place.session is None:
        return None
    found = urlencode({"q": f"{place.scope}/{place.user}/{place.session}/"})
    return h("span", " · ", h("a", "all runs of this session", href=f"/?{found}"))


def _cost(history: RunHistory) -> str:
    """Return the price of the model requests that have ended, those of sub-agents included."""
    nodes = history.of(NodeEnded)
    calls = [call for node in nodes for call in (*node.failed_attempts, node.model) if call is not None]
    used = [call for call in calls if call.usage.input or call.usage.output]
    prices = [nano_dollars(call) for call in used]
    unknown = prices.count(None)
    if unknown == len(used):
        return "no known price" if used else ""
    note = f", without {unknown:,} of {len(used):,} requests, whose price is not known" if unknown else ""
    return f"{dollars(sum(price or 0 for price in prices) / 1e9)}{note}"


def _cancel(history: RunHistory, *, can_cancel: bool) -> Html:
    place = history.place
    if not can_cancel:
        return h("p", "Read only. Set AGX_CONSOLE=full to allow cancelling.", class_="quiet")
    if history.lease == "cancelling":
        return h("p", "Cancellation is requested.", class_="quiet")
    fields = {"scope": place.scope, "user": place.user, "session": place.session, "run": place.run_id}
    hidden = [h("input", type="hidden", name=name, value=value) for name, value in fields.items()]
    button = h("button", "Cancel this run", id="cancel", class_="danger")
    return h("form", hidden, button, method="post", action="/cancel", data_ask="Cancel this run?")


def _waterfall(fall: Waterfall, *, is_live: bool) -> Html:
    rows = [_row(fall, bar) for bar in fall.bars]
    heads = [h("th", name, scope="col", class_=kind) for name, kind in (("What", ""), ("Began", "number extra"),
             ("Took", "number"), ("Tokens", "number extra"))]  # fmt: skip
    heads.append(h("th", h("span", "Outcome", class_="word"), scope="col"))
    time = h("th", h("span", "Time", class_="unseen"), _axis(fall, fall.from_ns), scope="col", class_="time")
    table = h(
        "table",
        h("caption", "Nodes and tools by their start", class_="unseen"),
        h("thead", h("tr", heads, time)),
        h("tbody", rows),
        class_="waterfall",
    )
    # A live run grows at its end.
    box = h("div", table, id="fall", class_="scroll", tabindex=0, role="region", aria_label="Waterfall",
            data_follow=is_live)  # fmt: skip
    left_out = f"{fall.left_out:,} steps before these are left out." if fall.left_out else None
    kinds = (("wait", "waiting for the model"), ("model", "model answers"), ("tool", "tool"), ("step", "step"))
    legend = h("p", [h("span", text, class_=f"key {kind}") for kind, text in kinds], class_="quiet", aria_hidden="true")
    note = h("p", left_out, class_="quiet") if left_out else None
    return h("section", h("h2", "Waterfall", id="h-fall"), note, box, legend)


def _axis(fall: Waterfall, from_ns: int) -> Html:
    whole = fall.end_ns - from_ns
    marks = [h("span", tick(from_ns - fall.start_ns + whole * n // _TICKS, whole)) for n in range(_TICKS + 1)]
    return h("span", marks, class_="axis", aria_hidden="true")


def _row(fall: Waterfall, bar: Bar) -> Html:
    end_ns = fall.end_ns if bar.end_ns is None else bar.end_ns
    used = bar.usage
    estimated = "~" if used is not None and used.source == "estimated" else ""
    outcome = bar.outcome or "open"
    fold = None
    if bar.kind == "run" and bar.depth:  # a sub-agent's
        fold = h("button", "▾", type="button", class_="fold", data_fold=f"{bar.start_ns}-{bar.name}",
                 aria_expanded="true", aria_label=f"Steps of {bar.name}")  # fmt: skip
    error = error_name(outcome, bar.error_type)
    return h(
        "tr",
        h("th", h("span", bar.name, fold, class_=f"kind {bar.kind} d{min(bar.depth, 9)}"), scope="row"),
        h("td", f"+{duration(bar.start_ns - fall.start_ns)}", class_="number extra"),
        h("td", duration(end_ns - bar.start_ns), class_="number"),
        h("td", f"{estimated}{used.input:,} → {estimated}{used.output:,}" if used else "", class_="number extra"),
        h("td", badge(outcome), " ", h("span", error, class_="why") if error else None),
        h("td", _bar(fall, bar, end_ns), class_="time"),
        data_depth=bar.depth,
    )


def _bar(fall: Waterfall, bar: Bar, end_ns: int) -> Html:
    x, end = _x(fall, fall.from_ns, bar.start_ns), _x(fall, fall.from_ns, end_ns)
    shapes = [h("rect", x=x, y=3, width=max(3, end - x), height=12, rx=2, class_=f"bar {bar.kind} {bar.outcome}")]
    if bar.first_chunk_ns is not None:
        # Until its first chunk a model is only waited for.
        first = _x(fall, fall.from_ns, bar.first_chunk_ns)
        shapes.append(h("rect", x=x, y=3, width=max(0, first - x), height=12, rx=2, class_="wait"))
    return h("svg", shapes, viewBox=f"0 0 {_WIDE} 18", preserveAspectRatio="none", aria_hidden="true", class_="lane")


def _x(fall: Waterfall, from_ns: int, at_ns: int) -> int:
    at = (at_ns - from_ns) * _WIDE // (fall.end_ns - from_ns)
    return max(0, min(_WIDE, at))


def _tokens(fall: Waterfall) -> Html | None:
    if not fall.tokens:
        return None
    last = fall.tokens[-1]
    most = max(1, last.input + last.output)
    lines = []
    for kind in ("input", "output"):
        points, y = [f"0,{60}"], 60
        for step in fall.tokens:
            x = _x(fall, fall.start_ns, step.at_ns)
            level = 60 - (step.input if kind == "input" else step.output) * 56 // most
            points += [f"{x},{y}", f"{x},{level}"]
            y = level
        points.append(f"{_WIDE},{y}")
        lines.append(h("polyline", points=" ".join(points), class_=f"tokens {kind}"))
    text = f"{last.input:,} tokens in and {last.output:,} out, step by step at the end of each model request"
    picture = h("svg", lines, viewBox=f"-4 0 {_WIDE + 8} 62", preserveAspectRatio="none", role="img", aria_label=text)
    keys = [h("span", f"{last.input:,} in", class_="key input"), h("span", f"{last.output:,} out", class_="key output")]
    legend = h("figcaption", keys, aria_hidden="true")
    heading = h("h2", "Tokens over time", id="h-tokens")
    return h("section", heading, h("figure", picture, _axis(fall, fall.start_ns), legend))


def _events(history: RunHistory, ended: RunEnded | None, *, content: bool) -> Html:
    if history.entries:
        lines = write_lines(history.entries, content=content)
        note = "" if content else "Texts are hidden. Set AGX_CONSOLE_CONTENT=1 to show them."
        cut = len(lines) > LINES or (history.begin is not None and history.entries[0].id != history.begin.id)
        note += " These are the newest." if cut else ""
        lines = lines[-LINES:]
    else:
        lines = list(sampled_lines(ended)) if ended is not None else []
        note = "The stream has expired: these are the events that the run's last fact holds."
        if ended is not None and ended.events_between:
            note += f" {ended.events_between:,} in the middle were left out."
    start_ms = history.begin.id[0] if history.begin is not None else lines[0].at_ms if lines else 0
    rows = [_line(line, start_ms) for line in lines]
    log = h("div", h("ol", rows, class_="log"), id="log", class_="scroll", tabindex=0, role="region",
            aria_label="Events, oldest first", data_follow=True)  # fmt: skip
    heading = h("h2", "Events ", h("span", f"{len(lines):,}", class_="count"), id="h-events")
    if not lines:
        log = h("p", "None yet." if history.is_live else "None are retained.", class_="quiet")
    return h("section", heading, h("p", note, class_="quiet") if note else None, log)


def _line(line: Line, start_ms: int) -> Html:
    about = line.about
    if line.inner:
        rows = [_line(one, start_ms) for one in line.inner[-LINES:]]
        summary = h("summary", line.what, " ", h("b", about), " ", h("span", f"{len(line.inner):,}", class_="count"))
        return h("li", h("details", summary, h("ol", rows, class_="log")), id=line.key, class_="inner")
    if line.pieces:
        about = f"{about} · {line.chars:,} characters in {line.pieces:,} events"
    return h(
        "li",
        h("span", f"+{(line.at_ms - start_ms) / 1_000:.2f} s", class_="at", title=clock(line.at_ms)),
        h("span", line.what, class_=f"what {line.what if line.what.isascii() and line.what.isalpha() else ''}"),
        h("span", about, class_="about"),
        h("span", line.text, class_="text") if line.text else None,
        id=line.key,
    )
