"""A real Chromium, and what people do on a chat page in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

expect.set_options(timeout=30_000)  # ms


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """Give a Chromium. Until it is closed Playwright keeps an event loop running, beside which no async test can be."""
    chromium = shutil.which("chromium")
    assert chromium, "chromium is not on the PATH: install it, or deselect with -m 'not browser'"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def ask(page: Page, text: str) -> None:
    """Send a message."""
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def shows(page: Page, *texts: str) -> None:
    """Wait until the page shows exactly these messages."""
    expect(page.locator("article")).to_have_text(list(texts))
