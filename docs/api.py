"""Fills docs/reference with the docstrings of the public names, and what `events.py` writes of the event catalogue.

A page has a line `<!-- api: agx.run -->` for each name; with `only` after the name, members are left out. The text up
to `<!-- end -->` is written by `python docs/api.py`; with `--check` it exits 1 where a committed page differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

import events
import griffe

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
WIDTH = 120  # of a line of text
_CODE_WIDTH = 88

_BLOCK = re.compile(r"<!-- api: (\S+)( only)? -->\n.*?<!-- end -->\n", re.DOTALL)
_SKIPPED = {"self", "cls"}


def outputs() -> dict[Path, str]:
    """Return every page of the reference with its content."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser="google", docstring_options={"warnings": False})
    loader.load("agx")
    loader.resolve_aliases(external=False)
    agx = loader.modules_collection

    def describe(found: re.Match[str]) -> str:
        lines = "\n".join(_describe(agx[found[1]], found[1], 3, members=not found[2]))
        return f"<!-- api: {found[1]}{found[2] or ''} -->\n{lines}\n<!-- end -->\n"

    return {page: _BLOCK.sub(describe, page.read_text()) for page in sorted(PAGES.glob("*.md"))}


def _describe(item: griffe.Object | griffe.Alias, name: str, level: int, *, members: bool = True) -> Iterator[str]:
    item = item.final_target if isinstance(item, griffe.Alias) else item
    yield f"{'#' * level} {name}{'()' if item.is_function else ''}\n"
    if isinstance(item, griffe.Class):
        yield f"```python\n{_call(f'class {item.name}', item.parameters)}\n```\n"
    elif isinstance(item, griffe.Function):
        yield "```python\n" + "\n".join(map(_signature, item.overloads or [item])) + "\n```\n"
    if item.docstring is not None:
        for section in item.docstring.parsed:
            yield from _write(section)
    for member in sorted(item.members.values(), key=lambda one: one.lineno or 0) if item.is_class and members else ():
        if member.is_public and member.docstring is not None:
            yield from _describe(member, f"{item.name}.{member.name}", level + 1)


def _signature(function: griffe.Function) -> str:
    head = f"{'async ' if 'async' in function.labels else ''}def {function.name}"
    return _call(head, function.parameters, "()", f" -> {function.returns}" if function.returns is not None else "")


def _call(head: str, parameters: griffe.Parameters, empty: str = "", end: str = "") -> str:
    given = list(_parameters(parameters))
    line = f"{head}({', '.join(given)}){end}" if given else f"{head}{empty}{end}"
    return line if len(line) <= _CODE_WIDTH else f"{head}(\n" + "".join(f"    {one},\n" for one in given) + f"){end}"


def _parameters(parameters: griffe.Parameters) -> Iterator[str]:
    kinds = griffe.ParameterKind
    keyword_only = False
    for one in parameters:
        if one.name in _SKIPPED or one.name.startswith("_"):
            continue
        if one.kind is kinds.keyword_only and not keyword_only:
            keyword_only = True
            yield "*"
        stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(one.kind, "")
        keyword_only = keyword_only or stars == "*"
        annotation = f": {one.annotation}" if one.annotation is not None else ""
        default = (
            "" if one.default is None or stars else f"{' = ' if annotation else '='}{one.default}".replace("'", '"')
        )
        yield f"{stars}{one.name}{annotation}{default}"


def _write(section: griffe.DocstringSection) -> Iterator[str]:
    kinds = griffe.DocstringSectionKind
    match section.kind:
        case kinds.text:
            yield f"{section.value}\n"
        case kinds.parameters | kinds.attributes:
            yield "\n".join(_item(one.name, one.description) for one in section.value) + "\n"
        case kinds.raises:
            yield "Raises:\n"
            yield "\n".join(_item(one.annotation, one.description) for one in section.value) + "\n"
        case kinds.returns | kinds.yields:
            yield f"{section.kind.value.capitalize()}:\n"
            yield "\n".join(_item(one.annotation, one.description) for one in section.value) + "\n"
        case _:
            raise ValueError(f"a docstring has a section {section.kind.value!r}, which docs/api.py can't write")


def _item(name: object, text: str) -> str:
    line = f"- `{name}`: {' '.join(text.split())}"
    return fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them with `--check`; return the exit code."""
    written = outputs() | events.outputs()
    stale = {page: text for page, text in written.items() if page.read_text() != text}
    for page, text in stale.items():
        if "--check" in arguments:
            print(f"{page.relative_to(ROOT)} differs from its source: run `make docs-api` and commit the result")
        else:
            page.write_text(text)
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
