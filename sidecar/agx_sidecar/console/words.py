"""How the pages say things: outcomes, durations, times, sessions."""

from __future__ import annotations

import time
from urllib.parse import urlencode

from .html import Html, h

# Never by colour alone.
_MARKS = {
    "live": "●",
    "completed": "✔",
    "cancelled": "■",
    "cancelling": "■",
    "failed": "✘",
    "lost": "✝",
    "dead": "✝",
    "ok": "✔",
    "retry": "↻",
    "error": "✘",
    "denied": "⊘",
    "deferred": "…",
    "open": "●",
}
_WORDS = {"dead": "dead, waits for a sidecar", "open": "under way", "cancelling": "being cancelled"}


def badge(outcome: str) -> Html:
    """Return an outcome with its mark."""
    mark = h("span", _MARKS.get(outcome, "?"), aria_hidden="true")
    return h("span", mark, " ", _WORDS.get(outcome, outcome), class_=f"badge {outcome if outcome in _MARKS else ''}")


def duration(ns: int) -> str:
    """Return a duration to three digits or so."""
    if ns <= 0:
        return "0 s"
    seconds = ns / 1e9
    if seconds < 1:
        return f"{seconds * 1_000:.0f} ms" if seconds >= 0.001 else f"{ns // 1_000} µs"
    return f"{seconds:.2f} s" if seconds < 60 else ago(ns // 1_000_000)


def ago(ms: int) -> str:
    """Return a length of time as people say it; the clocks of two machines may make it negative, which is now."""
    seconds = max(0, ms) // 1_000
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3_600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 86_400:
        return f"{seconds // 3_600} h {seconds % 3_600 // 60:02} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3_600} h"


def clock(ms: int) -> str:
    """Return a moment, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ms / 1_000))
    except (ValueError, OverflowError, OSError):  # a fact can say any number
        return "at no time"


def who(scope: str, user: str | None, session: str | None) -> Html:
    """Return scope, user and session."""
    parts = [part for part in (scope, user, session) if part is not None]
    return h("span", "/".join(parts), class_="who")


def run_url(scope: str, run_id: str, user: str | None, session: str | None, at_ms: int) -> str:
    """Return where a run's page is."""
    given = {"scope": scope, "run": run_id, "user": user, "session": session, "at": at_ms or None}
    return "/run?" + urlencode({name: value for name, value in given.items() if value is not None})
