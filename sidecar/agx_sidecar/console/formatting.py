"""Formats what the pages show: outcomes, durations, times, sessions."""

from __future__ import annotations

import time
from urllib.parse import urlencode

from agx.facts.outcome_marks import MARKS as OUTCOME_MARKS

from .html import Child, Html, h

# Never by colour alone.
_MARKS = {
    **OUTCOME_MARKS,
    "live": "●",
    "cancelling": "■",
    "dead": "☠",
    "recovering": "↻",
    "resumed": "↻",
    "ok": "✔",
    "retry": "↻",
    "error": "✘",
    "denied": "⊘",
    "deferred": "…",
    "open": "●",
}
_AS_TEXT = "\ufe0e"  # a browser shows the mark in front as text, not as a picture
_TEXTS = {
    "dead": "dead, waits for a sidecar",
    "recovering": "recovering, waits for a worker",
    "resumed": "resumed by another process",
    "open": "under way",
    "cancelling": "being cancelled",
}


def badge(outcome: str) -> Html:
    """Return an outcome with its mark."""
    mark = h("span", _MARKS.get(outcome, "?") + _AS_TEXT, aria_hidden="true")
    text = h("span", outcome_text(outcome), class_="word")
    return h("span", mark, " ", text, class_=f"badge {outcome if outcome in _MARKS else ''}")


def outcome_text(outcome: str) -> str:
    """Return an outcome as text."""
    return _TEXTS.get(outcome, outcome)


def duration(ns: int) -> str:
    """Return a duration to three digits or so."""
    if ns <= 0:
        return "0 s"
    seconds = ns / 1e9
    if seconds < 1:
        return f"{seconds * 1_000:.0f} ms" if seconds >= 0.001 else f"{ns // 1_000} µs"
    return f"{seconds:.2f} s" if seconds < 60 else ago(ns // 1_000_000)


def dollars(value: float) -> str:
    """Return a price in US dollars; a run often costs less than a cent."""
    if 0 < value < 0.0001:
        return "less than $0.0001"
    return f"${value:,.2f}" if value >= 1 else f"${value:.4f}"


def ago(ms: int) -> str:
    """Return a length of time in two units; negative, as the clocks of two machines may make it, counts as 0."""
    seconds = max(0, ms) // 1_000
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3_600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 86_400:
        return f"{seconds // 3_600} h {seconds % 3_600 // 60:02} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3_600} h"


def tick(ns: int, whole_ns: int) -> str:
    """Return a mark of a time axis that is `whole_ns` long, short enough to stand beside others."""
    seconds = ns // 1_000_000_000
    if whole_ns < 60_000_000_000:
        return duration(ns)
    hours = f"{seconds // 3_600}:" if whole_ns >= 3_600_000_000_000 else ""
    return f"{hours}{seconds // 60 % 60:02}:{seconds % 60:02}"


def clock(ms: int) -> str:
    """Return a moment, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ms / 1_000))
    except (ValueError, OverflowError, OSError):  # a fact can say any number
        return "at no time"


def error_name(outcome: str, error_type: str | None) -> str | None:
    """Return an error's short name, or None where the outcome names it already."""
    return error_type.rpartition(".")[2] if error_type and error_type != outcome else None


def session_name(scope: str, user: str | None, session: str | None) -> Html:
    """Return scope, user and session; a narrow screen breaks them where they meet."""
    parts: list[Child] = [scope]
    for part in (user, session):
        parts += ["/", h("wbr"), part] if part is not None else []
    return h("span", *parts, class_="who")


def run_url(scope: str, run_id: str, user: str | None, session: str | None, at_ms: int) -> str:
    """Return where a run's page is."""
    given = {"scope": scope, "run": run_id, "user": user, "session": session, "at": at_ms or None}
    return "/run?" + urlencode({name: value for name, value in given.items() if value is not None})
