"""The documentation's site, built as `make docs` builds it: complete, as in the repository, loading nothing."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import expect
from support.browser import running_chromium
from support.docs import DOCS, ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")),
    ROOT / "helm/agx-sidecar/README.md",
    *sorted(DOCS.rglob("*.md")),
]
PUBLIC = {
    "agx": None,
    "agx.web": None,
    "agx.testing": None,
    "agx.redis_session": ["RedisSessions"],
    "agx.sql_session": ["SqlSession", "SqlSessions", "make_table"],
    "agx.session": ["SessionStore", "StoredSession"],
    "agx.replay": ["ErrorEvent", "InfoEvent", "replay"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a link, an anchor or a page of the navigation that leads nowhere fails the build."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


class Elements(HTMLParser):
    """What an HTML page is made of: all its elements, and how many of each its text has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.counts: Counter[str] = Counter()
        self._in_text = "<article" not in (text := page.read_text())
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, {name: value or "" for name, value in attrs}))
        self._in_text = self._in_text or tag == "article"
        if self._in_text:
            self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._in_text = False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_what_it_is_in_the_repository(site: Path, page: Path, tmp_path: Path) -> None:
    """MkDocs reads Markdown otherwise than a repository's front page does: a list may end where it goes on there."""
    path = page.relative_to(ROOT if DOCS not in page.parents else DOCS)
    built = site / (path.parent if path.name == "README.md" else path.with_suffix("")) / "index.html"
    there = tmp_path / "there.html"
    there.write_text(MarkdownIt().enable("table").render(page.read_text()))
    kinds = ("blockquote", "h1", "h2", "h3", "img", "li", "ol", "pre", "td", "ul")
    here, expected = Elements(built).counts, Elements(there).counts
    diagrams = page.read_text().count("\n```mermaid\n")  # images on the site, blocks of code in the repository
    expected.update(img=diagrams, pre=-diagrams)
    assert {kind: here[kind] for kind in kinds} == {kind: expected[kind] for kind in kinds}


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^### ([\w.]+)", pages, re.MULTILINE))
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        for name in names or module.__all__:
            made = getattr(module, name)
            assert {f"{module_name}.{name}", f"{made.__module__}.{made.__qualname__}"} & documented, name


def test_pages_and_styles_name_nothing_elsewhere(site: Path) -> None:
    found = []
    for page in site.rglob("*.html"):
        for tag, attributes in Elements(page).all:
            loads = [attributes.get("src", ""), attributes.get("href", "") if tag == "link" else ""]
            found += [(page.name, tag, url) for url in loads if re.match(r"(?:\w+:)?//", url)]
    for style in site.rglob("*.css"):
        loads = re.findall(r"""(?:url\(|@import)\W*((?:\w+:)?//[^)"']+)""", style.read_text())
        found += [(style.name, "css", url) for url in loads]
    assert not found


@contextmanager
def served(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.browser
def test_a_reader_finds_things_and_nothing_is_asked_for_elsewhere(site: Path) -> None:
    with served(site) as url, running_chromium() as browser:
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            asked: list[str] = []
            errors: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(url)
            page.keyboard.press("/")
            expect(page.locator(".md-search-result__meta")).to_have_text("Type to start searching")
            page.keyboard.type("SessionBusyError")
            page.locator("a[href$='=sessionbusyerror#agxsessionbusyerror']").click()
            expect(page.get_by_role("heading", name="SessionBusyError")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert [one for one in asked if not one.startswith(url)] == []
            assert not errors
