"""`agx.js`: in node against a service that is played, typed, and in Chromium against docs/how-to/page.md's blocks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from support.browser import ask, shows
from support.docs import Blocks, every_block
from support.leaks import leak_checked
from support.model_server import Finish, ModelServer, Silence, Text, say
from support.waiting import wait_until_sync
from support.web import WebService, running_service

from agx.embedded.server import EmbeddedServer
from agx.error_codes import SESSION_BUSY

pytestmark = [pytest.mark.browser, pytest.mark.npm, pytest.mark.timeout(240)]

SOURCES = Path(__file__).parent / "page"
CLIENT = Path(str(files("agx.client")))
PAGE = "docs/how-to/page.md"
PLAIN = """<!doctype html><title>Plain</title><main></main><output></output>
<button id="ask">Ask</button><button id="stop">Stop</button><script type="module" src="plain.js"></script>"""
EVENTS_BY_TYPE = """
import type { AgxEvent } from "./agx.js";

export function describe(event: AgxEvent): string | undefined {
  if (event.type === "end") return event.body.outcome;
  if (event.type !== "event" || event.origin !== "pydantic-ai") return;
  if (event.body.event === "part_delta") return event.body.content_delta;
  if (event.body.event === "part_start" && event.body.part_kind === "tool-call")
    // @ts-expect-error: a tool's call has arguments, and no content
    return event.body.content;
}
"""
SERVED = """
from fastapi.staticfiles import StaticFiles
from service import app

app.mount("/", StaticFiles(directory=SITE, html=True))
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_client_in_node() -> None:
    assert re.search(
        r"^# pass [1-9]", run("node", "--test", "--test-timeout=30000", "agx.test.mjs", cwd=SOURCES), re.MULTILINE
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The blocks of the page beside the client's files, as a reader has them, and what builds them."""
    home = tmp_path_factory.mktemp("page")
    for source in (*(SOURCES / "react").iterdir(), *CLIENT.glob("agx*")):
        shutil.copy(source, home)
    (home / "chat.tsx").write_text(Blocks(PAGE).take("tsx"))
    run("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", cwd=home)
    yield home
    shutil.rmtree(home / "node_modules")  # pytest keeps its directories


@pytest.fixture(scope="module")
def site(home: Path) -> Path:
    (site := home / "site").mkdir()
    shutil.copy(home / "index.html", site)
    run("node_modules/.bin/esbuild", "main.tsx", "--bundle", "--jsx=automatic", "--outfile=site/page.js", cwd=home)
    (site / "plain.html").write_text(PLAIN)
    (site / "plain.js").write_text(Blocks(PAGE).take("js"))
    return site


def test_the_types_are_strict(home: Path) -> None:
    wrong = 'import { connect } from "./agx.js";\n// @ts-expect-error: an error unless this line has one\n'
    (home / "wrong.ts").write_text(wrong + 'connect("/api").session("s").start(1);\n')
    (home / "events.ts").write_text(EVENTS_BY_TYPE)
    options = ["--noEmit", "--strict", "--target", "es2023", "--module", "nodenext", "--jsx", "react-jsx"]
    run("node_modules/.bin/tsc", *options, "main.tsx", "wrong.ts", "events.ts", cwd=home)


def test_the_types_name_what_the_module_exports(home: Path) -> None:
    exported = re.findall(r"^export (?:class|const|function) (\w+)", (CLIENT / "agx.js").read_text(), re.MULTILINE)
    declared = re.findall(r"^export (?:class|const|function) (\w+)", (CLIENT / "agx.d.ts").read_text(), re.MULTILINE)
    assert sorted(exported) == sorted(declared)


@pytest.fixture(scope="module")
def service(
    server: EmbeddedServer, shared_model_server: ModelServer, tmp_path_factory: pytest.TempPathFactory, site: Path
) -> Iterator[WebService]:
    """One service for the file: its Redis is not emptied between tests, and each test has a session of its own."""
    served = {"served.py": SERVED.replace("SITE", repr(str(site)))}
    home = tmp_path_factory.mktemp("served")
    with leak_checked(server.url) as url, running_service("served", home, url, shared_model_server, served) as service:
        yield service


@pytest.fixture
def page(request: pytest.FixtureRequest, service: WebService, browser: Browser) -> Iterator[Page]:
    """A tab with a session named after the test."""
    context = browser.new_context(base_url=service.url)
    context.add_init_script("localStorage.setItem('token', 'token-of-ada')")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"/#{request.node.name}")
    yield page
    context.close()
    wait_until_sync(lambda: service.client.get("/api/live").json() == {"sessions": []}, what="the end of all runs")
    assert not errors


def test_every_block_of_the_page(service: WebService, page: Page, model_server: ModelServer, tmp_path: Path) -> None:
    with every_block("docs/how-to/page.md") as blocks:
        blocks.take("js"), blocks.take("tsx")  # the site is made of them
        line = blocks.take("bash").replace("http://localhost:8000", service.url)
        run("bash", "-ec", line, cwd=tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
            file.name: file.read_bytes() for file in CLIENT.glob("agx*")
        }
        model_server.script(say("Hello."))
        page.goto("/plain.html")
        expect(page.locator("output")).to_have_text("ready")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("main")).to_have_text("Say hello Hello.")
        expect(page.locator("output")).to_have_text("completed")


def test_the_module_is_served_without_a_login_and_cached_by_its_hash(service: WebService) -> None:
    url = f"{service.url}/api/agx.js"
    found = httpx.get(url, trust_env=False)
    assert found.headers["content-type"].startswith("text/javascript")
    again = httpx.get(url, headers={"If-None-Match": found.headers["etag"]}, trust_env=False)
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(url, headers={"If-None-Match": '"old"'}, trust_env=False).status_code == 200


def test_a_reload_a_second_tab_and_the_stop_button(page: Page, model_server: ModelServer) -> None:
    model_server.script((Text("half "), Silence(), Text("and half"), Finish()), (Text("never "), Silence()))
    ask(page, "Tell me")
    shows(page, "Tell me", "half ")
    page.reload()
    other = page.context.new_page()
    other.goto(page.url)
    for tab in (page, other):
        shows(tab, "Tell me", "half ")
    model_server.release()
    for tab in (page, other):
        shows(tab, "Tell me", "half and half")
    model_server.hold()
    # The other tab finds the new turn by itself.
    ask(page, "Go on")
    shows(other, "Tell me", "half and half", "Go on", "never ")
    other.get_by_role("button", name="Stop").click()
    for tab in (page, other):
        expect(tab.locator("output")).to_have_text("Stopped.")


def test_a_busy_session_is_a_sentence(page: Page, model_server: ModelServer, service: WebService) -> None:
    model_server.script((Text("slow "), Silence(), Finish()))
    # Between two looks of the page for other turns.
    page.route("**/events*", lambda route: route.fulfill(status=204))
    page.reload()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    session = page.url.partition("#")[2]
    service.start(session, "Hi")
    ask(page, "Me too")
    expect(page.locator("output")).to_have_text(SESSION_BUSY.sentence)
    service.client.post(f"/api/sessions/{session}/cancel")
