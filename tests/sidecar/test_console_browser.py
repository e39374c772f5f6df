"""The console in a real Chromium: opened by its link, a live run followed and cancelled, hostile names harmless."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import Browser, Locator, Page, async_playwright, expect
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.replica import PARTITIONS, PREFIX, Queue, StartReplica
from support.visitor import TOKEN, begin_live, console_port
from support.waiting import wait_until

import agx
from agx.redis import keys

pytestmark = [pytest.mark.browser]

ATTACK = "<img src=x onerror=\"document.title='attacked'\">"

expect.set_options(timeout=30_000)  # ms


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        await browser.close()


class Tab:
    """A page of the browser, what its scripts complained of, and what it asked other machines for."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        page.on("request", lambda asked: asked.url.startswith(origin) or self.strangers.append(asked.url))


@pytest.fixture
async def tab(browser: Browser, start_replica: StartReplica, configured: Redis) -> Tab:
    """A tab of a browser that knows nothing yet, and a console that shows texts and may cancel."""
    sidecar = start_replica(AGX_CONSOLE="full", AGX_CONSOLE_PORT="0", AGX_CONSOLE_TOKEN=TOKEN, AGX_CONSOLE_CONTENT="1")
    page = await (await browser.new_context()).new_page()
    return Tab(page, f"http://127.0.0.1:{console_port(sidecar)}")


async def open_by_link(tab: Tab) -> None:
    await tab.page.goto(f"{tab.origin}/#token={TOKEN}")
    await expect(tab.page.get_by_role("heading", name="Runs")).to_be_visible()
    assert tab.page.url == f"{tab.origin}/"  # the token is out of the address and the history
    tab.complaints.clear()  # of the 401 that asked for the token


async def test_a_wrong_token_is_refused_and_the_right_one_opens(tab: Tab) -> None:
    page = tab.page
    await page.goto(f"{tab.origin}/#token=not-the-token-but-as-long")
    await expect(page.get_by_role("alert")).to_have_text("That is not the token.")
    await page.get_by_label("Token").fill("wrong again")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_be_visible()
    await page.get_by_label("Token").fill(TOKEN)
    await page.get_by_role("button", name="Open").click()
    await expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    assert await page.evaluate("document.cookie") == ""  # no script can read it


async def test_a_live_run_is_followed_and_cancelled(tab: Tab) -> None:
    await open_by_link(tab)
    page = tab.page
    await expect(page.get_by_text("No service has run on this prefix yet")).to_be_visible()
    stage = ScriptedAgent(words=("Hello ", "there"), hold_after=1)
    running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", ScopeDeps(session_id="chat-1")))
    # It comes by itself, without a reload.
    await page.get_by_role("region", name="Live runs").get_by_role("link", name="staged").click()
    await expect(page.get_by_role("heading", name="staged")).to_contain_text("live")
    log = page.get_by_role("region", name="Events")
    await expect(log).to_contain_text("Hello")
    await expect(page.get_by_role("region", name="Waterfall").get_by_text("model request 1")).to_be_visible()
    await agx.add(1, 1, "chat-1", type="info", origin="custom", body={"msg": "as it comes"})
    await expect(log).to_contain_text("as it comes")
    questions: list[str] = []

    async def accept(dialog: object) -> None:
        questions.append(dialog.message)  # type: ignore[attr-defined] # playwright's Dialog
        await dialog.accept()  # type: ignore[attr-defined]

    page.on("dialog", accept)
    await page.get_by_role("button", name="Cancel this run").click()
    with pytest.raises(agx.AgxCanceledError):
        await asyncio.wait_for(running, 30)
    assert questions == ["Cancel this run?"]
    await expect(page.get_by_role("heading", name="staged")).to_contain_text("cancelled")
    await expect(page.get_by_role("button", name="Cancel this run")).to_have_count(0)
    await page.get_by_role("link", name="All runs").first.click()
    row = page.get_by_role("region", name="Cancelled and completed").get_by_role("row", name="staged")
    await expect(row).to_contain_text("1/1/chat-1")
    assert (tab.complaints, tab.strangers) == ([], [])


async def test_updates_keep_the_keyboards_place_and_can_be_paused(tab: Tab, configured: Redis) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps(session_id="first"))
    await open_by_link(tab)
    page = tab.page
    link = page.get_by_role("link", name="staged")
    await expect(link).to_have_count(1)
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    for _ in range(20):
        await page.keyboard.press("Tab")
        if await link.evaluate("it => it === document.activeElement"):
            break
    await expect(link).to_be_focused()
    kept = await link.evaluate_handle("it => it")
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps(session_id="second"))
    await expect(page.get_by_role("link", name="staged")).to_have_count(2)
    assert await kept.evaluate("it => it === document.activeElement")
    await page.get_by_role("button", name="Pause updates").click()
    await expect(page.get_by_role("button", name="Pause updates")).to_have_attribute("aria-pressed", "true")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps(session_id="third"))
    await wait_until(lambda: _sees(tab, "third"))
    assert asked == []
    await page.get_by_role("button", name="Pause updates").click()
    await expect(page.get_by_role("link", name="staged")).to_have_count(3)


async def _sees(tab: Tab, session: str) -> bool:
    """Whether the console itself knows of a session, asked beside the page."""
    return session in await (await tab.page.context.request.get(f"{tab.origin}/")).text()


async def test_hostile_names_and_texts_do_nothing(tab: Tab) -> None:
    await open_by_link(tab)
    page = tab.page
    stage = ScriptedAgent(words=(ATTACK, "</span><script>document.title='attacked'</script>", "held"), hold_after=2)
    agent = stage.agent()
    agent.name = ATTACK
    running = asyncio.create_task(agx.run(FakeSession(), agent, ATTACK, ScopeDeps(session_id="chat-1")))
    await page.get_by_role("region", name="Live runs").get_by_role("link", name=ATTACK).click()
    await expect(page.get_by_role("region", name="Events")).to_contain_text("<script>document.title")
    assert await page.locator("main img, main script").count() == 0
    assert "attacked" not in (await page.title()).replace(ATTACK, "")
    assert await agx.cancel(1, 1, "chat-1")
    with pytest.raises(agx.AgxCanceledError):
        await asyncio.wait_for(running, 30)
    assert (tab.complaints, tab.strangers) == ([], [])


async def test_what_a_sub_agent_does_stays_folded_or_open(tab: Tab) -> None:
    """A live run: the page is refreshed each second, and keeps what its reader has folded and opened."""
    inner = ScriptedAgent(hold_after=2)
    outer = ScriptedAgent(call_tool=True, delegate=inner.agent(capabilities=[agx.AgxCapability()]))
    running = asyncio.create_task(agx.run(FakeSession(), outer.agent(), "Hi", deps=ScopeDeps()))
    await inner.reached.wait()
    await open_by_link(tab)
    await tab.page.get_by_role("link", name="staged").first.click()
    steps = tab.page.locator("tr[data-depth='4']")
    await expect(steps.first).to_be_visible()
    button = tab.page.get_by_role("button", name="Steps of staged")
    await button.click()
    await expect(steps.first).to_be_hidden()
    text = tab.page.locator("details .text")
    await expect(text).to_be_hidden()
    await tab.page.locator("summary").click()
    await expect(text).to_have_text("one two ")
    await agx.add(1, 1, "s", type="info", origin="test", body={"msg": "later"})
    await expect(tab.page.locator("#log").get_by_text("later")).to_be_visible()  # it was refreshed
    await expect(text).to_be_visible()
    await expect(button).to_have_attribute("aria-expanded", "false")
    await expect(steps.first).to_be_hidden()
    await button.press("Enter")
    await expect(steps.first).to_be_visible()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert tab.complaints == []


async def test_a_run_is_cancelled_by_keyboard_alone(tab: Tab) -> None:
    page = tab.page
    page.on("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
    stage, session = ScriptedAgent(hold_after=1), FakeSession(may_save=asyncio.Event())
    running = asyncio.create_task(agx.run(session, stage.agent(), "Hi", ScopeDeps(session_id="chat-1")))
    await stage.reached.wait()
    await page.goto(f"{tab.origin}/")
    await expect(page.get_by_label("Token")).to_be_focused()
    await page.keyboard.type(TOKEN)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    await tab_to(page, page.get_by_role("link", name="staged"))
    await page.keyboard.press("Enter")
    await tab_to(page, page.get_by_role("button", name="Cancel this run"))
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("Cancellation is requested")).to_be_visible()
    assert session.may_save is not None
    session.may_save.set()
    with pytest.raises(agx.AgxCanceledError):
        await asyncio.wait_for(running, 30)
    await expect(page.get_by_role("status")).to_have_text("The run is cancelled")  # which is read out


async def tab_to(page: Page, wanted: Locator) -> None:
    """Press Tab until something has the focus; it must be seen there."""
    for _ in range(30):
        await page.keyboard.press("Tab")
        if await wanted.evaluate("it => it === document.activeElement"):
            assert await wanted.evaluate("it => getComputedStyle(it).outlineStyle") != "none"
            return
    raise AssertionError("no Tab leads there")


@pytest.fixture(scope="session")
def axe() -> Iterator[Path]:
    """The checker of accessibility, from npm."""
    with tempfile.TemporaryDirectory(prefix="agx-axe-") as home:
        quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        subprocess.run(["npm", "install", *quiet, "axe-core@4.14.1"], cwd=home, check=True, timeout=180)
        yield Path(home, "node_modules", "axe-core", "axe.min.js")


WIDTHS = (1200, 800, 375)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


async def test_axe_finds_nothing(browser: Browser, start_replica: StartReplica, configured: Redis, axe: Path) -> None:
    sidecar = start_replica(AGX_CONSOLE="full", AGX_CONSOLE_PORT="0", AGX_CONSOLE_TOKEN=TOKEN, AGX_CONSOLE_CONTENT="1")
    origin = f"http://127.0.0.1:{console_port(sidecar)}"
    context = await browser.new_context()
    await context.add_init_script(path=axe)
    page = await context.new_page()
    await page.goto(f"{origin}/")
    await is_accessible(page)
    await page.goto(f"{origin}/#token={TOKEN}")
    await expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    with pytest.raises(ZeroDivisionError):
        await agx.run(
            FakeSession(), ScriptedAgent(model_error=ZeroDivisionError()).agent(), "Hi", ScopeDeps(session_id="s1")
        )
    await agx.run(FakeSession(), ScriptedAgent(call_tool=True).agent(), "Hi", ScopeDeps(session_id="s2"))
    stage = ScriptedAgent(hold_after=1)
    running = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", ScopeDeps(session_id="live")))
    await expect(page.get_by_role("link", name="staged")).to_have_count(3)
    await is_accessible(page)
    for link in await page.get_by_role("link", name="staged").all():
        beside = await context.new_page()
        await beside.goto(f"{origin}{await link.get_attribute('href')}")
        await expect(beside.get_by_role("region", name="Waterfall")).to_be_visible()
        await is_accessible(beside)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def is_accessible(page: Page) -> None:
    """Check a page at each width, light and dark; the waterfall's bars are seen without scrolling."""
    for width in WIDTHS:
        await page.set_viewport_size({"width": width, "height": 800})
        await page.emulate_media(color_scheme="light")
        assert await violations(page) == [], width
        await page.emulate_media(color_scheme="dark")
        assert await violations(page, "color-contrast") == [], width  # only colours depend on the scheme
        lane = await page.evaluate("document.querySelector('.lane')?.getBoundingClientRect().right ?? 0")
        assert lane < width


async def violations(page: Page, *rules: str) -> list[str]:
    """What axe finds by all its rules or by some, and whether the page is wider than its window."""
    found = await page.evaluate("rules => axe.run(rules.length ? { runOnly: rules } : {})", rules)
    passed = [rule["id"] for rule in found["passes"]]
    assert passed == list(rules) if rules else len(passed) > 15
    said = [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]]
    wide = await page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return [*said, "the page scrolls sideways"] if wide else said


async def test_a_thousand_live_runs_stay_usable(tab: Tab, queue: Queue) -> None:
    for n in range(1_000):
        session = keys.SessionKeys(PREFIX, f"scope-{n % 50}", "u", f"s{n}")
        begin_live(queue.redis, session, f"run-{n}", partitions=PARTITIONS, agent=f"agent-{n}")
    await open_by_link(tab)
    page = tab.page
    await expect(page.get_by_role("heading", name="Live")).to_contain_text("1,000")
    await page.evaluate(
        "new PerformanceObserver((list) => (window.longest = Math.max(window.longest || 0, "
        "...list.getEntries().map((task) => task.duration)))).observe({ type: 'longtask', buffered: true })"
    )
    field = page.get_by_role("searchbox")
    await field.type("agent-77")
    for _ in range(2):  # typing goes on while the page is renewed under it
        await page.wait_for_event("requestfinished")
    await field.type("7")
    await expect(field).to_have_value("agent-777")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("link", name="agent-")).to_have_count(1)
    assert await page.evaluate("window.longest || 0") < 1_000  # ms


async def test_it_is_legible_in_light_and_dark(
    browser: Browser, start_replica: StartReplica, configured: Redis
) -> None:
    sidecar = start_replica(AGX_CONSOLE="read", AGX_CONSOLE_PORT="0")
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps())
    page = await (await browser.new_context()).new_page()
    await page.goto(f"http://127.0.0.1:{console_port(sidecar)}/")
    await page.get_by_role("link", name="staged").click()
    await expect(page.get_by_role("heading", name="staged")).to_be_visible()
    await page.wait_for_load_state("load")  # its style sheet, too
    grounds = set()
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ratios = await page.evaluate(_CONTRASTS)
        assert len(ratios) > 20
        assert min(ratios) >= 4.5  # WCAG AA
    assert len(grounds) == 2


# The contrast of every text with the ground that is behind it.
_CONTRASTS = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (text) => {
    const [r, g, b] = parse(text).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (it) => {
    for (; it; it = it.parentElement) {
      const colour = getComputedStyle(it).backgroundColor;
      if (parse(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const ratios = [];
  while (texts.nextNode()) {
    const it = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !it.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(it).color), light(ground(it))];
    ratios.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return ratios;
}"""
