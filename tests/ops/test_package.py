"""The wheel and the source distribution, as an index takes them: built once, and checked."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from support.docs import ROOT

import agx

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # https://keepachangelog.com/en/1.1.0/


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dist")
    run("uv", "build", "--no-build-isolation", "--python", sys.executable, "--out-dir", str(place), str(ROOT))
    return place


def run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_string(wheel.read(name).decode())


def test_an_index_takes_both(dist: Path) -> None:
    packages = [*dist.glob("*.whl"), *dist.glob("*.tar.gz")]
    assert len(packages) == 2
    run("twine", "check", "--strict", *map(str, packages))


def test_the_metadata_are_complete(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("opale-agent-stream", agx.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.11")
    assert metadata["Summary"]
    assert metadata["Author-email"]
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))
    assert urls.keys() >= {"Repository", "Documentation", "Changelog", "Issues"}
    assert set(metadata.get_all("Provides-Extra", [])) >= {"cli", "demo", "server", "sidecar", "sql", "web", "worker"}


def test_the_description_has_no_link_that_leads_nowhere_on_an_index(metadata: Message) -> None:
    text = str(metadata.get_payload())
    assert "## Twenty lines" in text
    assert "```mermaid" not in text
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")] == []


def test_the_wheel_has_what_is_no_module(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"agx/client/agx.js", "agx/client/agx.d.ts", "agx_sidecar/console/console.js", "agx/py.typed"} <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"agx", "agx_sidecar", "opale"}


def test_the_source_distribution_has_the_tests_and_the_pages(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "docs/tutorial.md", "tests/conftest.py", "Makefile"} <= names
    assert not [name for name in names if "node_modules" in name or name.startswith((".venv", "build/", "dist/"))]


def test_the_changelog_has_the_form_that_tools_read() -> None:
    first, *versions = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert first == "[Unreleased]"
    assert [version for version in versions if not re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version)] == []
    for section in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds]
