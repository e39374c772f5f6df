"""docs/tutorial.md followed from top to bottom: its files, its commands, its page in a real Chromium, Prometheus."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ops.boards import targets
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.docs import code_blocks
from support.leaks import leak_checked
from support.model_server import MODEL, Finish, ModelServer, Silence, Text, call, say
from support.terminals import Terminals
from support.waiting import wait_until_sync

from agx.child import draw_ports

expect.set_options(timeout=30_000)  # ms

pytestmark = [pytest.mark.browser, pytest.mark.prometheus, pytest.mark.timeout(300)]

PAGE = "tutorial.md"
ROOT = Path(__file__).parents[2]
INSTALL, SERVER, START, TERMINAL, SIDECAR, LOOK, PROMETHEUS = code_blocks(PAGE, "bash")

# What the page says it leaves empty.
EMPTY = {
    "Model errors",
    "Errors by model",
    "Errors by type",
    "Last export",
    "Longest silence of a live run",
}


class Reader(Terminals):
    """Somebody who follows the page in an empty directory; only ports and addresses are others'."""

    def __init__(self, home: Path, model: ModelServer) -> None:
        self.web, self.metrics, self.console, self.prometheus = draw_ports(4)
        ports = {"UVICORN_PORT": self.web, "AGX_HTTP_PORT": self.metrics, "AGX_CONSOLE_PORT": self.console}
        served = {"MODEL": f"openai-chat:{MODEL}", "OPENAI_BASE_URL": model.base_url}
        super().__init__(home, {name: str(port) for name, port in ports.items()} | served)
        self.write("app.py", "python")
        self.write("chat.html", "html")
        self.write("prometheus.yml", "yaml")

    def write(self, name: str, language: str) -> None:
        (block,) = code_blocks(PAGE, language)
        assert f"`{name}`" in (ROOT / "docs" / PAGE).read_text()
        # Its rates are over ten seconds in this test.
        block = block.replace(": 5s", ": 1s")
        (self.home / name).write_text(block.replace("localhost:9464", f"localhost:{self.metrics}"))


@pytest.fixture
def reader(model_server: ModelServer, tmp_path: Path) -> Iterator[Reader]:
    with Reader(tmp_path, model_server) as reader:
        yield reader


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is not on the PATH: install it, or deselect with -m 'not browser'"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def shows(page: Page, *texts: str) -> None:
    expect(page.locator("article")).to_have_text(list(texts))


def is_done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def chat(reader: Reader, page: Page, model: ModelServer) -> None:
    """What the page says under "Try it", from a reload to a terminal."""
    page.goto("/")
    model.script(call("roll_dice", '{"sides": 1}'), say("A one."))
    ask(page, "Roll a die")
    shows(page, "Roll a die", "roll_dice: 1", "A one.")
    is_done(page)

    model.script((Text("half "), Silence(), Text("and half"), Finish()))
    before = ["Roll a die", "roll_dice: 1", "A one.", "Tell me"]
    ask(page, "Tell me")
    shows(page, *before, "half ")
    page.reload()
    shows(page, *before, "half ")
    second = page.context.new_page()
    second.goto("/")
    shows(second, *before, "half ")
    tail, said = reader.keep_running(TERMINAL)
    wait_until_sync(lambda: "half" in said.read_text(), what="the run is shown by `agx tail`")
    assert re.search(r"tutorial/\S+/first +helper", said.read_text()), "`agx ls` does not list it"
    model.release()
    for tab in (page, second):
        shows(tab, *before, "half and half")
        is_done(tab)
    second.close()
    wait_until_sync(lambda: tail.ended, what="the end of `agx tail`")
    assert tail.end() == 0, said.read_text()
    page.reload()
    shows(page, *before, "half and half")


def stop(page: Page, model: ModelServer, session: str) -> None:
    page.goto(f"/#{session}")
    page.reload()
    gone = model.disconnects
    model.script((Text("never "), Silence()))
    ask(page, "Go on for ever")
    shows(page, "Go on for ever", "never ")
    page.get_by_role("button", name="Stop").click()
    is_done(page)
    shows(page, "Go on for ever", "never ", "canceled")
    wait_until_sync(lambda: model.disconnects == gone + 1, what="the model's connection is closed")
    page.reload()
    shows(page, "Go on for ever", "never ")


def numbers(reader: Reader, expr: str) -> list[float]:
    """Return what a panel would draw."""
    now = time.time()
    asked = {"query": expr, "start": now - 60, "end": now, "step": 1}
    reply = httpx.post(f"http://localhost:{reader.prometheus}/api/v1/query_range", data=asked).json()
    assert reply["status"] == "success", reply
    found: list[dict[str, Any]] = reply["data"]["result"]
    return [float(value) for series in found for _, value in series["values"] if math.isfinite(float(value))]


def count(reader: Reader) -> dict[str, float]:
    """Look at the sidecar's figures as the page does; return the runs by outcome."""
    (shown,) = code_blocks(PAGE, "text")
    said = reader.run(LOOK.replace("9464", str(reader.metrics)))
    # The page shows all lines that come, but for the numbers.
    assert re.sub(r" \S+$", "", said, flags=re.MULTILINE) == re.sub(r" \S+$", "", shown, flags=re.MULTILINE)
    return {outcome: float(runs) for outcome, runs in re.findall(r'outcome="(\w+)".* (\S+)$', said, re.MULTILINE)}


def test_the_page_from_top_to_bottom(reader: Reader, browser: Browser, model_server: ModelServer) -> None:
    reader.check_install(INSTALL)
    _, said = reader.keep_running(SERVER, "--port 0")
    url = wait_until_sync(lambda: re.match(r"redis://\S+", said.read_text()), what="the server")[0]
    reader.environment["AGX_REDIS_URL"] = url
    with leak_checked(url):
        reader.keep_running(START)
        web = f"http://localhost:{reader.web}"
        wait_until_sync(lambda: answers(web), what="the service")
        context = browser.new_context(base_url=web)
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        stop(page, model_server, "second")
        chat(reader, page, model_server)
        assert not errors

        # Somebody else is somebody else.
        other = browser.new_context(base_url=web)
        stranger = other.new_page()
        stranger.goto("/#second")
        is_done(stranger)
        shows(stranger)
        other.close()

        reader.keep_running(SIDECAR)
        wait_until_sync(lambda: count(reader) == {"completed": 2, "cancelled": 1, "failed": 0, "lost": 0})
        assert answers(f"http://localhost:{reader.console}/")
        fetching = PROMETHEUS.replace("https://raw.githubusercontent.com/opale/pydantic-ai-stream/main", ROOT.as_uri())
        reader.keep_running(fetching, f"--web.listen-address=localhost:{reader.prometheus}")
        wait_until_sync(lambda: answers(f"http://localhost:{reader.prometheus}/-/ready"), what="Prometheus")
        assert len(list(reader.home.glob("agx-*.json"))) == 3
        rules = httpx.get(f"http://localhost:{reader.prometheus}/api/v1/rules?type=alert").json()["data"]["groups"]
        assert any(group["rules"] for group in rules)

        # "Ask a few more questions, stop one": what comes before the first scrape is no increase to Prometheus.
        wait_until_sync(lambda: numbers(reader, "agx_runs_total"), what="the first scrape")
        model_server.script(call("roll_dice", '{"sides": 1}'), say("A one again."))
        ask(page, "Again")
        expect(page.get_by_text("A one again.")).to_be_visible()
        is_done(page)
        model_server.hold()
        stop(page, model_server, "third")
        undrawn = {target.expr: target.name for target in targets() if target.panel["title"] not in EMPTY}

        def all_drawn() -> bool:
            for expr in [expr for expr in undrawn if numbers(reader, expr)]:
                del undrawn[expr]
            assert not undrawn, "\n".join(undrawn.values())
            return True

        wait_until_sync(all_drawn)
        context.close()
