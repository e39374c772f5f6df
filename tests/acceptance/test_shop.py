"""examples/shop as `make example` starts it, walked through in Chromium."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from redis import Redis
from support.browser import ask
from support.docs import ROOT
from support.replica import Scrape
from support.waiting import wait_until_sync

from agx.embedded.child import Child, draw_ports

expect.set_options(timeout=30_000)  # ms

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

LAST_PAGE = re.compile("Page 4 of 4.*within a week")


class Shop:
    """The running example."""

    def __init__(self, child: Child, log: Path, url: str) -> None:
        self.child = child
        self.url = url
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def total(self, name: str, **labels: str) -> float:
        """Return a metric's sum, as the sidecar has it now."""
        return Scrape(httpx.get(self._find_address("metrics"), trust_env=False).text).total(name, **labels)

    def _find_address(self, name: str) -> str:
        return str(re.findall(rf"{name} +(\S+)", self.log)[-1])

    def count_questions(self, user: str, count: int) -> None:
        """Have a user of acme asked so many questions in this minute, which does not end."""
        with Redis.from_url(self._find_address("Redis")) as redis:
            redis.set(f"shop:asked:acme:{user}", count, ex=3_600)

    def find_worker(self, user: str) -> int:
        """Return the process that answers the user's latest prompt."""
        return int(re.findall(rf"process (\d+) answers {user} ", self.log)[-1])


PER_MINUTE = 30  # more than the walk asks, however short it is


@contextmanager
def running_shop(home: Path) -> Iterator[Shop]:
    (port,) = draw_ports(1)
    environment = {
        **os.environ,
        "PORT": str(port),
        "SHOP_PAUSE": "0.03",
        "SHOP_LEASE_TTL": "1",
        "SHOP_PER_MINUTE": str(PER_MINUTE),
    }
    environment["TMPDIR"] = str(home)
    log = home / "shop.log"
    child = Child(
        [sys.executable, ROOT / "examples/shop/run.py"], log=log, home=home / "nothing", environment=environment
    )
    shop = Shop(child, log, f"http://127.0.0.1:{port}")
    try:
        wait_until_sync(lambda: shop.log.count("this worker serves") == 2 or child.ended, 60, what="two workers")
        yield shop
    finally:
        child.end()
        print(shop.log)


def log_in(browser: Browser, url: str, user: str, password: str) -> Page:
    """Return a tab of a browser in which nobody else is logged in."""
    page = browser.new_context().new_page()
    page.goto(url)
    page.get_by_label("User").fill(user)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    return page


def test_a_walk_through_the_shop(browser: Browser, tmp_path: Path) -> None:
    with running_shop(tmp_path) as shop:
        wrong = log_in(browser, shop.url, "ada", "desk")
        expect(wrong.locator("output")).to_have_text("unknown user or wrong password")
        page = log_in(browser, shop.url, "ada", "lamp")
        expect(page.locator("#who")).to_have_text("ada of acme")

        ask(page, "A long answer, please")
        expect(page.locator("article").last).to_contain_text("Page 1 of 4")
        tab = page.context.new_page()
        tab.goto(page.url)
        expect(tab.locator("article").first).to_have_text("A long answer, please")

        killed = shop.find_worker("ada")
        os.kill(killed, signal.SIGKILL)
        tab.get_by_label("Message").fill("My desk is white")
        tab.get_by_role("button", name="Add").click()
        for each in (page, tab):
            expect(each.locator("article.user-prompt")).to_have_text(["A long answer, please", "My desk is white"])
            expect(each.locator("article.text").last).to_have_text(LAST_PAGE)
            expect(each.get_by_role("button", name="Send")).to_be_visible()
            expect(each.locator("article.text").filter(has_text="You added: My desk is white")).to_have_count(1)
            expect(each.locator("article.tool-return")).to_have_count(4)
        assert shop.find_worker("ada") != killed
        assert f"process {killed} has ended" in shop.log

        other = log_in(browser, shop.url, "eve", "sofa")
        expect(other.locator("#who")).to_have_text("eve of globex")
        other.goto(page.url)
        expect(other.get_by_role("button", name="Send")).to_be_visible()
        expect(other.locator("article")).to_have_count(0)

        ask(page, "What goes with it in style?")
        expect(page.locator("article.text").last).to_contain_text("A plain wooden desk")
        page.get_by_role("button", name="Yes").click()
        expect(page.get_by_role("button", name="Yes")).to_have_attribute("aria-pressed", "true")
        wait_until_sync(lambda: shop.total("agx_feedback_total", agent="support") == 1, what="the thumb is counted")

        ask(page, "I order it")
        for each in (page, tab):
            expect(each.locator(".decide")).to_contain_text('place_order {"item":"lamp","quantity":1}')
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        assert "order " not in shop.log
        tab.get_by_role("button", name="Approve").click()
        for each in (page, tab):
            expect(each.locator("article.text").last).to_have_text("Ordered: 1 x lamp. ")
            expect(each.locator(".decide")).to_have_count(0)
        wait_until_sync(lambda: "1 x lamp for ada of acme" in shop.log, what="the order")
        ask(page, "Once more, long")
        expect(page.locator("article").last).to_contain_text("Page 1 of 4")
        page.get_by_role("button", name="Stop").click()
        expect(tab.locator("output")).to_have_text("Stopped.")

        shop.count_questions("ada", PER_MINUTE - 1)
        ask(page, "Hello")
        expect(page.locator("article.text").last).to_contain_text("Ask me to order")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        ask(page, "Hello")
        expect(page.locator("output")).to_contain_text("You have asked too often")
        assert shop.child.end(signal.SIGINT) == 0
        assert shop.log.count("this worker has stopped") == 2
        assert "Traceback" not in shop.log
    assert [file.name for file in tmp_path.iterdir()] == ["shop.log"]
