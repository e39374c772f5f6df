"""docs/tutorial.md followed from top to bottom: its files, its commands, its page in a real Chromium, Prometheus."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ops.boards import targets
from playwright.sync_api import Browser, Page, expect
from support.browser import ask, shows
from support.docs import DOCS, Blocks, every_block
from support.leaks import leak_checked
from support.model_server import Finish, ModelServer, Silence, Text, call, say
from support.terminals import Terminals
from support.waiting import wait_until_sync

from agx.embedded.child import draw_ports

expect.set_options(timeout=30_000)  # ms

pytestmark = [pytest.mark.browser, pytest.mark.prometheus, pytest.mark.timeout(300)]

# What the page says it leaves empty.
EMPTY = {
    "Model errors",
    "Errors by model",
    "Errors by type",
    "Last export",
    "Longest silence of a live run",
    "Job wait p95",
    "Recovery p95",
    "Feedback by agent and model",
    "Scores given",
    "Steered messages",
    "Approval wait p95",
    "Approvals by decision",
}


class Reader(Terminals):
    """Somebody who follows the page in an empty directory; only ports and addresses are others'."""

    def __init__(self, home: Path, model: ModelServer) -> None:
        self.web, self.metrics, self.console, self.prometheus = draw_ports(4)
        ports = {"UVICORN_PORT": self.web, "AGX_HTTP_PORT": self.metrics, "AGX_CONSOLE_PORT": self.console}
        super().__init__(home, {name: str(port) for name, port in ports.items()} | model.environment)

    def write(self, name: str, block: str) -> None:
        assert f"`{name}`" in (DOCS / "tutorial.md").read_text()
        # Its rates are over ten seconds in this test.
        block = block.replace(": 5s", ": 1s")
        (self.home / name).write_text(block.replace("localhost:9464", f"localhost:{self.metrics}"))


@pytest.fixture
def reader(model_server: ModelServer, tmp_path: Path) -> Iterator[Reader]:
    with Reader(tmp_path, model_server) as reader:
        yield reader


def is_done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def chat(reader: Reader, page: Page, model: ModelServer, terminal: str) -> None:
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
    tail, said = reader.keep_running(terminal)
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
    page.goto("about:blank")  # else the page reloads by itself, whenever it notices its new hash
    page.goto(f"/#{session}")
    gone = model.disconnects
    model.script((Text("never "), Silence()))
    ask(page, "Go on for ever")
    shows(page, "Go on for ever", "never ")
    page.get_by_role("button", name="Stop").click()
    is_done(page)
    shows(page, "Go on for ever", "never ")
    expect(page.locator("output")).to_have_text("Stopped.")
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


def test_the_page_from_top_to_bottom(reader: Reader, browser: Browser, model_server: ModelServer) -> None:
    with every_block("docs/tutorial.md") as blocks:
        reader.run(blocks.take("bash", "pip install"))
        _, said = reader.keep_running(blocks.take("bash", "agx.server"), "--port 0")
        url = wait_until_sync(lambda: re.match(r"redis://\S+", said.read_text()), what="the server")[0]
        reader.environment["AGX_REDIS_URL"] = url
        with leak_checked(url):
            reader.write("app.py", blocks.take("python"))
            reader.write("chat.html", blocks.take("html"))
            web = f"http://localhost:{reader.web}"
            reader.keep_running(blocks.take("bash", "uvicorn"), url=web)
            context = browser.new_context(base_url=web)
            page = context.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            stop(page, model_server, "second")
            chat(reader, page, model_server, blocks.take("bash", "agx tail"))
            with page.expect_response("**/feedback") as scored:
                page.get_by_role("button", name="Good answer").click()
            assert scored.value.json() == {"recorded": True}
            expect(page.get_by_role("button", name="Good answer")).to_be_hidden()
            assert not errors
            a_stranger_sees_nothing(browser, web)
            the_sidecar_counts(reader, blocks)
            the_boards_fill(reader, blocks, page, model_server)
            context.close()


def a_stranger_sees_nothing(browser: Browser, web: str) -> None:
    other = browser.new_context(base_url=web)
    stranger = other.new_page()
    stranger.goto("/#second")
    is_done(stranger)
    shows(stranger)
    other.close()


def the_sidecar_counts(reader: Reader, blocks: Blocks) -> None:
    reader.keep_running(blocks.take("bash", "agx-sidecar"), url=f"http://localhost:{reader.metrics}/metrics")
    look = blocks.take("bash", "curl").replace("9464", str(reader.metrics))
    # The page shows all lines that come; here one question less was asked.
    expected = blocks.take("text").replace(" 3.0\n", " 2.0\n")
    wait_until_sync(lambda: reader.run(look) == expected)
    assert httpx.get(f"http://localhost:{reader.console}/").is_success


def the_boards_fill(reader: Reader, blocks: Blocks, page: Page, model: ModelServer) -> None:
    reader.write("prometheus.yml", blocks.take("yaml"))
    url = f"http://localhost:{reader.prometheus}"
    reader.keep_running(
        blocks.take("bash", "prometheus"),
        f"--web.listen-address=localhost:{reader.prometheus}",
        url=f"{url}/-/ready",
    )
    assert len(list(reader.home.glob("agx-*.json"))) == 3
    rules = httpx.get(f"{url}/api/v1/rules?type=alert").json()["data"]["groups"]
    assert any(group["rules"] for group in rules)

    # "Ask a few more questions, stop one": what comes before the first scrape is no increase to Prometheus.
    wait_until_sync(lambda: numbers(reader, "agx_runs_total"), what="the first scrape")
    model.script(call("roll_dice", '{"sides": 1}'), say("A one again."))
    ask(page, "Again")
    expect(page.get_by_text("A one again.")).to_be_visible()
    is_done(page)
    model.hold()
    stop(page, model, "third")
    undrawn = {target.expr: target.name for target in targets() if target.title not in EMPTY}

    def all_drawn() -> bool:
        for expr in [expr for expr in undrawn if numbers(reader, expr)]:
            del undrawn[expr]
        assert not undrawn, "\n".join(undrawn.values())
        return True

    wait_until_sync(all_drawn)
