"""Draws the Mermaid diagrams of the documentation as SVG files, which the site shows: `make docs-diagrams`.

GitHub draws Mermaid itself. The site's theme would load Mermaid from another server into each reader's browser, and the
site loads nothing from elsewhere (tests/ops/test_site.py). So each diagram is drawn once, by Mermaid in a Chromium, and
committed. Its file is named by a hash of its source: a changed diagram without a new file fails the build of the site.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "docs" / "img" / "diagrams"

_FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r"^\s*accTitle: (.+)$", re.MULTILINE)
_VERSION = "11.17.2"
_SETTINGS = {
    "startOnLoad": False,
    "theme": "neutral",
    "fontFamily": "Arial, Helvetica, 'DejaVu Sans', sans-serif",
    # Labels as SVG text: an <img> shows no HTML inside an SVG in every browser.
    "htmlLabels": False,
    "flowchart": {"htmlLabels": False, "nodeSpacing": 30, "rankSpacing": 40},
}


def replace_diagrams(markdown: str, page: Path) -> str:
    """Return a page with an image in the place of each diagram. `page` is its path in the repository."""

    def to_image(found: re.Match[str]) -> str:
        file = DIRECTORY / get_file_name(found[1])
        if not file.exists():
            raise FileNotFoundError(f"a diagram of {page} is not drawn: run `make docs-diagrams` and commit the result")
        up = "../" * len(page.parent.parts)
        return f"![{get_title(found[1])}]({up}{file.relative_to(ROOT)})"

    return _FENCE.sub(to_image, markdown)


def find_diagrams() -> dict[str, str]:
    """Return the sources of all diagrams in committed pages, by the names of their files."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    sources = [source for page in pages for source in _FENCE.findall(page.read_text())]
    return {get_file_name(source): source for source in sources}


def get_file_name(source: str) -> str:
    """Return the file of a diagram: it changes with the source, the settings and the version of Mermaid."""
    return hashlib.sha256(json.dumps([source, _SETTINGS, _VERSION]).encode()).hexdigest()[:12] + ".svg"


def get_title(source: str) -> str:
    """Return what a diagram shows, for readers who do not see it: its line `accTitle: ...`."""
    if (found := _TITLE.search(source)) is None:
        raise ValueError(f"a diagram has no line `accTitle: what it shows`:\n{source}")
    return found[1]


def main() -> None:
    """Draw what is not drawn yet, and remove what no page shows any more; with `--check` only compare."""
    sources = find_diagrams()
    DIRECTORY.mkdir(exist_ok=True)
    if "--check" in sys.argv:
        if {file.name for file in DIRECTORY.iterdir()} != set(sources):
            sys.exit("docs/img/diagrams differs from the diagrams of the pages: run `make docs-diagrams`")
        return
    for file in DIRECTORY.iterdir():
        if file.name not in sources:
            file.unlink()
    missing = {name: source for name, source in sources.items() if not (DIRECTORY / name).exists()}
    if missing:
        with tempfile.TemporaryDirectory(prefix="agx-diagrams-") as home:
            (Path(home) / "package.json").write_text(json.dumps({"dependencies": {"mermaid": _VERSION}}))
            subprocess.run(["npm", "install", "--no-audit", "--ignore-scripts"], cwd=home, check=True)  # noqa: S607
            _draw(missing, Path(home) / "node_modules/mermaid/dist/mermaid.min.js")


def _draw(sources: dict[str, str], mermaid: Path) -> None:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  the site is built without a browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=mermaid)
        page.evaluate("settings => mermaid.initialize(settings)", _SETTINGS)
        for name, source in sources.items():
            # Parsed and written as XML again: an <img> accepts nothing else.
            script = """async source => {
                const { svg } = await mermaid.render("diagram", source);
                const element = new DOMParser().parseFromString(svg, "text/html").querySelector("svg");
                const { width, height } = element.viewBox.baseVal;
                element.setAttribute("width", width);
                element.setAttribute("height", height);
                return new XMLSerializer().serializeToString(element);
            }"""
            (DIRECTORY / name).write_text(page.evaluate(script, source) + "\n")
        browser.close()


if __name__ == "__main__":
    main()
