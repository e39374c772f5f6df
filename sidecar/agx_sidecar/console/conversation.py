"""Reads and shows the stored conversation of a session: what `RedisSession` keeps. It is content."""

from __future__ import annotations

from typing import Any

import orjson

from agx.redis.bus import Bus
from agx.redis.keys import SessionKeys

from .html import Html, h

MOST_BYTES = 2_000_000  # a longer conversation is not read
MESSAGES = 40  # the newest
_TEXT = 4_000  # characters of a part
_WHO = {"user-prompt": "user", "system-prompt": "instructions", "text": "agent", "thinking": "thinking",
        "tool-call": "calls", "tool-return": "result", "retry-prompt": "retry"}  # fmt: skip


async def read_conversation(bus: Bus, session: SessionKeys) -> list[tuple[str, str]]:
    """Return who and what of the newest messages, oldest first; none where Redis does not keep the conversation."""
    size = await bus.execute("HSTRLEN", session.messages, "messages")
    if not 0 < int(size or 0) <= MOST_BYTES:
        return []
    raw = await bus.execute("HGET", session.messages, "messages")
    try:
        messages = orjson.loads(raw or b"[]")
    except orjson.JSONDecodeError:
        return []
    parts = [part for message in _items(messages)[-MESSAGES:] for part in _items(message.get("parts"))]
    return [(_who(part), _text(part)[:_TEXT]) for part in parts]


def conversation_view(turns: list[tuple[str, str]]) -> Html | None:
    """Return the section of the page; None where there is nothing to show."""
    if not turns:
        return None
    rows = [h("li", h("span", who, class_="what"), h("span", text, class_="text")) for who, text in turns]
    log = h("div", h("ol", rows, class_="log"), id="talk", class_="scroll", tabindex=0, role="region",
            aria_label="The conversation, oldest first", data_follow=True)  # fmt: skip
    note = h("p", "As it is stored for the next run of the session.", class_="quiet")
    return h("section", h("h2", "Conversation", id="h-talk"), note, log)


def _items(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _who(part: dict[str, Any]) -> str:
    kind = str(part.get("part_kind"))
    name = part.get("tool_name")
    return f"{_WHO.get(kind, kind)} {name}" if isinstance(name, str) else _WHO.get(kind, kind)


def _text(part: dict[str, Any]) -> str:
    value = part.get("content", part.get("args", ""))
    if isinstance(value, list):
        value = " ".join(item if isinstance(item, str) else "[file]" for item in value)
    return value if isinstance(value, str) else orjson.dumps(value).decode()
