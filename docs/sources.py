"""Adds the README and other pages outside docs/ to the site, so that links work both there and in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from diagrams import replace_diagrams
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_PAGES = (
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "examples/shop/README.md",
    "helm/agx-sidecar/README.md",
)

_TARGET = re.compile(r"(?<=\]\()([\w./-]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Name every page by its path in the repository: links between pages are then what they are there."""
    named = [
        _file(f"docs/{file.src_uri}", config, file.dest_uri) if file.src_dir == config.docs_dir else file
        for file in files
    ]
    return Files([*named, *(_file(path, config, None) for path in _PAGES)])


def _file(path: str, config: MkDocsConfig, dest_uri: str | None) -> File:
    return File(path, str(_ROOT), config.site_dir, config.use_directory_urls, dest_uri=dest_uri)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace diagrams by images, and links to files of the repository that are no pages by links to its website."""

    def to_website(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[1]))
        if files.get_file_from_path(path) is not None or not (_ROOT / path).exists():
            return found[1]  # a page, or a broken link, which MkDocs reports
        return f"{config.extra['repository']}/{'tree' if (_ROOT / path).is_dir() else 'blob'}/main/{path}"

    return _TARGET.sub(to_website, replace_diagrams(markdown, Path(page.file.src_uri)))
