"""Builds HTML; all text is escaped, since names and contents on the pages come from users and models."""

from __future__ import annotations

from html import escape

_VOID = {"img", "input", "link", "meta", "wbr"}


class Html(str):
    """Text that is HTML already; only `h()` and `page()` make it."""

    __slots__ = ()


Child = str | int | None | list[Html]
Attribute = str | int | bool | None


def h(tag: str, /, *children: Child, **attributes: Attribute) -> Html:
    """Return an element. None is left out; `class_` is class, `aria_label` aria-label; True is an empty attribute."""
    opened = "".join(_attribute(key, value) for key, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{opened}>")
    return Html(f"<{tag}{opened}>{''.join(_text(child) for child in children)}</{tag}>")


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, list):
        return "".join(child)
    return child if isinstance(child, Html) else escape(str(child))


def page(title: str, *body: Child) -> bytes:
    """Return a whole document; its style and script are our own files."""
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("title", title),
        h("link", rel="icon", href="/icon.svg", type="image/svg+xml"),
        h("link", rel="stylesheet", href="/console.css"),
        h("script", src="/console.js", defer=True),
    )
    return f"<!doctype html>\n{h('html', head, h('body', *body), lang='en')}\n".encode("utf-8", "replace")
