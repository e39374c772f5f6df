"""Fixtures of the pages' tests: a Chromium, and a session of one's own where a file shares a service."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from support.browser import running_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for one file: Playwright keeps an event loop running, beside which no async test can be."""
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def session(request: pytest.FixtureRequest) -> str:
    """The name of the test, as the id of a session."""
    return re.sub(r"[^\w-]", "-", request.node.name)
