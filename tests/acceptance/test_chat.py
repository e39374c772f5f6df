"""The chat page of docs/how-to/chat.md in a real Chromium. Its AG-UI: test_ag_ui.py."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from support.ag_ui import CHAT as SOURCES
from support.ag_ui import AgUi, contents, install, run
from support.browser import ask, shows
from support.docs import Blocks, every_block
from support.leaks import leak_checked
from support.model_server import Finish, HardCut, ModelServer, Refusal, Silence, Text, ToolCall, call, say
from support.waiting import wait_until_sync
from support.web import BOB, WebService, running_service

import agx
from agx.embedded.server import EmbeddedServer
from agx.error_codes import MODEL_FAILED, SESSION_BUSY

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

PAGE = "docs/how-to/chat.md"
PACKAGES = json.loads((SOURCES / "package.json").read_text())["dependencies"]
TEMPLATE = {"esbuild", "react", "react-dom"}  # what `npm create vite` brings, with the bundler in Vite's place
SDK_6 = {"ai": "ai-6", "@ai-sdk/react": "ai-react-6"}  # names under which version 6 is installed beside 7

# The page's service, its page beside it, and a tool that speaks to the front end.
SERVED = """
import os
import signal

import agx
from agx.web import make_vercel_ai_router
from chat import agent, app, chat
from fastapi.staticfiles import StaticFiles
from pydantic_ai import Agent

app.include_router(make_vercel_ai_router(agent, **chat, sdk_version=6), prefix="/api/sdk-6")


@agent.tool
async def look(ctx, where: str) -> str:
    await ctx.deps.add_info({"looking": where})
    return f"nothing in {where}"


scout = Agent(agent.model, name="scout", capabilities=[agx.AgxCapability()])


@agent.tool_plain
async def explore() -> str:
    return (await scout.run("Explore")).output


@agent.tool(requires_approval=True)
async def delete(ctx, path: str) -> str:
    return f"{path} deleted"


@agent.tool_plain
def die() -> str:
    os.kill(os.getpid(), signal.SIGKILL)


app.mount("/", StaticFiles(directory=BUNDLE, html=True))
"""


@pytest.fixture(scope="session")
def bundle() -> Iterator[Path]:
    """The page and the AG-UI client, built from the blocks of the documentation."""
    # Not pytest's own directory, which would keep ten thousand files of npm's.
    with tempfile.TemporaryDirectory(prefix="agx-chat-") as directory:
        build(home := Path(directory))
        yield home


def build(home: Path) -> None:
    shutil.copytree(SOURCES, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    blocks = Blocks(PAGE)
    (home / "vite.config.js").write_text(blocks.take("js", "defineConfig"))
    (home / "App.jsx").write_text(blocks.take("jsx"))
    (home / "index.css").write_text(blocks.take("css"))
    (home / "agent.js").write_text(blocks.take("js"))
    install(home)
    esbuild = ["node_modules/.bin/esbuild", "--bundle", "--jsx=automatic", "--format=esm", "--log-level=warning"]
    run(*esbuild, "main.jsx", "--outfile=site/page.js", cwd=home)
    (home / "App.jsx").write_text((home / "App.jsx").read_text().replace('"/api/chat"', '"/api/sdk-6"'))
    main = (home / "main.jsx").read_text()
    # As the page has it for version 6.
    (home / "main.jsx").write_text(main.replace("<StrictMode>", "<>").replace("</StrictMode>", "</>"))
    aliases = [f"--alias:{name}={alias}" for name, alias in SDK_6.items()]
    run(*esbuild, *aliases, "main.jsx", "--outfile=site/sdk-6/page.js", cwd=home)
    run(*esbuild, "vite.config.js", "--outfile=vite.mjs", "--platform=node", "--packages=external", cwd=home)
    for site in ("site", "site/sdk-6"):
        shutil.copy(home / "index.html", home / site)


def commented(code: str) -> str:
    """Return the page's service with comments on its streams so often that every client shows that it minds none."""
    assert "**chat)" in code
    return code.replace("**chat)", "**chat, keep_alive=0.02)")


def files_of(bundle: Path) -> dict[str, str]:
    served = SERVED.replace("BUNDLE", repr(str(bundle / "site")))
    return {"served.py": served, "chat.py": commented(Blocks(PAGE).take("python"))}


@pytest.fixture(scope="module")
def service(
    server: EmbeddedServer, shared_model_server: ModelServer, tmp_path_factory: pytest.TempPathFactory, bundle: Path
) -> Iterator[WebService]:
    """One service for the file: its Redis is not emptied between tests, and each test has a session of its own."""
    home = tmp_path_factory.mktemp("chat")
    with (
        leak_checked(server.url) as url,
        running_service("served", home, url, shared_model_server, files_of(bundle)) as service,
    ):
        yield service


@contextmanager
def signed_in(browser: Browser, url: str) -> Iterator[Page]:
    """A tab of Ada's; what it logs as an error fails the test."""
    context = browser.new_context(base_url=url)
    context.add_init_script("localStorage.setItem('token', 'token-of-ada')")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors


@pytest.fixture
def page(service: WebService, browser: Browser, session: str) -> Iterator[Page]:
    """A tab that shows a new chat."""
    with signed_in(browser, service.url) as page:
        page.goto(f"/#{session}")
        yield page
    wait_until_sync(lambda: service.client.get("/api/live").json() == {"sessions": []}, what="the end of all runs")


def is_ready(page: Page) -> None:
    expect(page.locator("output")).to_have_text("ready")


def test_a_page_that_is_reloaded_in_the_middle_of_an_answer_goes_on(page: Page, model_server: ModelServer) -> None:
    model_server.script((Text("half "), Silence(), Text("and half"), Finish()), say("Next."))
    ask(page, "Tell me")
    shows(page, "Tell me", "half ")
    page.reload()
    shows(page, "Tell me", "half ")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    model_server.release()
    shows(page, "Tell me", "half and half")
    is_ready(page)
    assert len(model_server.requests) == 1

    page.reload()
    shows(page, "Tell me", "half and half")
    is_ready(page)
    ask(page, "And then?")
    shows(page, "Tell me", "half and half", "And then?", "Next.")
    is_ready(page)
    asked = [message["content"] for message in model_server.requests[1].body["messages"]]
    assert asked == ["Tell me", "half and half", "And then?"]


def test_whoever_is_not_signed_in_gets_a_form(service: WebService, browser: Browser, session: str) -> None:
    context = browser.new_context(base_url=service.url)
    page = context.new_page()
    page.goto(f"/#{session}")
    page.get_by_label("Token").fill("nobody")
    expect(page.get_by_role("alert")).not_to_be_visible()
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("This token is not accepted.")
    page.get_by_label("Token").fill("token-of-ada")
    page.get_by_role("button", name="Sign in").click()
    is_ready(page)
    context.close()


def test_a_lost_answer_is_shown_as_lost_and_asked_for_again(
    page: Page, service: WebService, model_server: ModelServer, session: str
) -> None:
    """The service is played: it breaks the connection, is away for a moment, and then knows that the run is lost."""
    is_ready(page)
    model_server.script((Text("half "), HardCut()), say("Whole."))
    post(service, session, "Tell me")
    shown = service.client.get(f"/api/chat/{session}").json() | {"outcome": "lost"}
    shown["messages"][-1]["metadata"]["agx"]["outcome"] = "lost"
    page.route("**/api/chat", lambda route: route.abort(), times=1)
    replies = iter([None, shown])

    def play(route: Route) -> None:
        reply = next(replies)
        route.abort() if reply is None else route.fulfill(json=reply)

    page.route(f"**/api/chat/{session}", play)
    ask(page, "Tell me")
    expect(page.get_by_role("alert")).to_have_text("The connection was lost: trying again ...")
    expect(page.locator("em")).to_have_text("The answer was lost: the process that gave it has stopped.")
    shows(page, "Tell me", "half ")
    page.get_by_role("button", name="Try again").click()
    shows(page, "Tell me", "Whole.")


def test_every_block_of_the_page(
    bundle: Path, page: Page, service: WebService, model_server: ModelServer, server: EmbeddedServer, session: str
) -> None:
    """The service and the bundle of all tests here are made of these blocks."""
    with every_block("docs/how-to/chat.md") as blocks:
        lines = blocks.take("bash", "npm install") + blocks.take("bash", "npm install")
        # Not run as they stand, which would take what is the newest today. The bundle is made of the same packages.
        installed = " ".join(re.findall(r"npm install (.*)", lines)).split()
        made_of = {name: version for name, version in PACKAGES.items() if name not in {*TEMPLATE, *SDK_6.values()}}
        assert {one for one in installed if "@" not in one[1:]} == {"@ag-ui/client"}
        for one in installed:
            name, _, major = one.rpartition("@") if "@" in one[1:] else (one, "", "")
            assert made_of.pop(name).startswith(major)
        assert not made_of
        assert (bundle / "vite.config.js").read_text() == blocks.take("js", "defineConfig")
        assert (bundle / "App.jsx").read_text() == blocks.take("jsx").replace('"/api/chat"', '"/api/sdk-6"')
        assert (bundle / "index.css").read_text() == blocks.take("css")
        assert (bundle / "agent.js").read_text() == blocks.take("js")
        assert (service.log.parent / "chat.py").read_text() == commented(blocks.take("python"))
        model_server.script(say("Hello."))
        ask(page, "Hi")
        shows(page, "Hi", "Hello.")
        expected = [("user", "Hi"), ("assistant", "Hello.")]
        assert contents(AgUi(bundle, service, "join", session).finish()) == expected
        assert the_consumer_works(blocks.take("python"), server.url, session) == "Hello."


def the_consumer_works(code: str, redis_url: str, session: str) -> str:
    found: dict[str, Any] = {}
    exec(code, found)

    async def consume() -> str:
        async with AsyncRedis.from_url(redis_url) as client:
            agx.configure(agx.Config(redis=client))
            said: str = await found["text_of"]("acme", "ada", session)
            await agx.aclose()
            return said

    # In a thread: beside Playwright's event loop there can be no other.
    with ThreadPoolExecutor() as threads:
        return threads.submit(asyncio.run, consume()).result()


def test_another_tab_shows_the_same(page: Page, model_server: ModelServer) -> None:
    model_server.script((Text("one "), Silence(), Text("two"), Finish()))
    ask(page, "Count")
    shows(page, "Count", "one ")
    other = page.context.new_page()
    other.goto(page.url)
    shows(other, "Count", "one ")
    # The first tab goes away; nothing is cancelled.
    page.close()
    model_server.release()
    shows(other, "Count", "one two")
    is_ready(other)


def test_the_stop_button_stops_the_run_on_the_server(
    page: Page, model_server: ModelServer, service: WebService, session: str
) -> None:
    model_server.script((Text("never "), Silence()))
    ask(page, "Go on for ever")
    shows(page, "Go on for ever", "never ")
    page.reload()
    shows(page, "Go on for ever", "never ")
    page.get_by_role("button", name="Stop").click()
    is_ready(page)
    expect(page.locator("em")).to_have_text("Stopped.")
    wait_until_sync(lambda: model_server.disconnects == 1, what="the model's connection is closed")
    end = [line for line in service.client.get(f"/api/sessions/{session}/events").text.splitlines() if '"end"' in line]
    assert '"outcome":"cancelled"' in end[0]
    page.reload()
    # What it had said is kept, and the conversation goes on.
    shows(page, "Go on for ever", "never ")
    expect(page.locator("em")).to_have_text("Stopped.")
    model_server.script(say("Fine."))
    ask(page, "Then stop")
    shows(page, "Go on for ever", "never ", "Then stop", "Fine.")
    expect(page.locator(".cost")).to_have_text("11 tokens · below $0.0001")
    shown = service.client.get(f"/api/chat/{session}").json()["messages"]
    assert [one["metadata"]["agx"]["outcome"] for one in shown[1::2]] == ["interrupted", "completed"]


def test_tools_are_seen_live_and_after_a_reload(page: Page, model_server: ModelServer) -> None:
    model_server.script(
        call("look", '{"where": ', '"the attic"}'), (Text("Nothing "), Silence(), Text("there."), Finish())
    )
    ask(page, "Where is it?")
    shows(page, "Where is it?", 'look {"where":"the attic"} output-availableNothing ')
    page.reload()
    shows(page, "Where is it?", 'look {"where":"the attic"} output-availableNothing ')
    model_server.release()
    shows(page, "Where is it?", 'look {"where":"the attic"} output-availableNothing there.')
    is_ready(page)


def test_what_a_sub_agent_does_is_seen_in_its_tool(page: Page, model_server: ModelServer) -> None:
    model_server.script(call("explore", "{}"), (Text("Under the "), Silence(), Text("sofa."), Finish()), say("Found."))
    ask(page, "Where is it?")
    shows(page, "Where is it?", "explore {} workingUnder the ")
    page.reload()
    shows(page, "Where is it?", "explore {} workingUnder the ")
    model_server.release()
    shows(page, "Where is it?", "explore {} output-availableFound.")
    is_ready(page)


def test_the_last_answer_is_given_again(page: Page, model_server: ModelServer) -> None:
    model_server.script(
        say("Blue."),
        call("look", '{"where": "the attic"}'),
        say("Green."),
        (Text("Red "), Silence(), Text("it is."), Finish()),
    )
    ask(page, "Which colour?")
    shows(page, "Which colour?", "Blue.")
    is_ready(page)
    page.get_by_role("button", name="Regenerate").click()
    shows(page, "Which colour?", 'look {"where":"the attic"} output-availableGreen.')
    is_ready(page)
    # An answer of several steps is one message, so all of it is given again.
    page.reload()
    shows(page, "Which colour?", 'look {"where":"the attic"} output-availableGreen.')
    page.get_by_role("button", name="Regenerate").click()
    shows(page, "Which colour?", "Red ")
    page.reload()
    shows(page, "Which colour?", "Red ")
    model_server.release()
    shows(page, "Which colour?", "Red it is.")
    is_ready(page)
    page.reload()
    shows(page, "Which colour?", "Red it is.")
    assert [message["content"] for message in model_server.requests[3].body["messages"]] == ["Which colour?"]


def test_a_failed_answer_is_asked_for_again(page: Page, model_server: ModelServer) -> None:
    model_server.script((Refusal(400, "no such luck"),), say("Better."), say("Best."))
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text(MODEL_FAILED.sentence)
    page.get_by_role("button", name="Try again").click()
    shows(page, "Hi", "Better.")
    is_ready(page)
    page.reload()
    page.get_by_role("button", name="Regenerate").click()
    shows(page, "Hi", "Best.")
    assert [message["content"] for message in model_server.requests[2].body["messages"]] == ["Hi"]


def test_an_answer_that_another_tab_has_gone_on_from_is_not_given_again(page: Page, model_server: ModelServer) -> None:
    model_server.script(say("One."), say("Two."))
    ask(page, "First")
    shows(page, "First", "One.")
    is_ready(page)
    other = page.context.new_page()
    other.goto(page.url)
    ask(other, "Second")
    shows(other, "First", "One.", "Second", "Two.")
    is_ready(other)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("alert")).to_contain_text("load it again")
    page.reload()
    shows(page, "First", "One.", "Second", "Two.")


DELETE = (Text("I will. "), ToolCall("delete", ('{"path": "/a"}',)), Finish("tool_calls"))


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize(
    ("button", "state", "content"), [("Approve", "available", "/a deleted"), ("Deny", "denied", "denied")]
)
def test_a_call_that_needs_approval_waits_for_it(
    page: Page, model_server: ModelServer, button: str, state: str, content: str, reloaded: bool
) -> None:
    model_server.script(DELETE, (Text("So be "), Silence(), Text("it."), Finish()))
    ask(page, "Delete /a")
    waiting = 'I will. delete {"path":"/a"} approval-requestedApproveDeny'
    shows(page, "Delete /a", waiting)
    is_ready(page)
    if reloaded:
        page.reload()
        shows(page, "Delete /a", waiting)
    page.get_by_role("button", name=button).click()
    half = f'I will. delete {{"path":"/a"}} output-{state}So be '
    shows(page, "Delete /a", half)
    page.reload()
    shows(page, "Delete /a", half)
    model_server.release()
    shows(page, "Delete /a", half + "it.")
    is_ready(page)
    page.reload()
    shows(page, "Delete /a", half + "it.")
    assert content in model_server.requests[1].body["messages"][-1]["content"]


def test_the_page_with_version_6_of_the_sdk(
    service: WebService, browser: Browser, model_server: ModelServer, session: str
) -> None:
    with signed_in(browser, service.url) as page:
        page.goto(f"/sdk-6/#{session}")
        model_server.script((Text("Half "), Silence()), DELETE, (Text("So be "), Silence(), Text("it."), Finish()))
        ask(page, "Tell me")
        shows(page, "Tell me", "Half ")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("em")).to_have_text("Stopped.")
        is_ready(page)
        ask(page, "Delete /a")
        shows(page, "Tell me", "Half ", "Delete /a", 'I will. delete {"path":"/a"} approval-requestedApproveDeny')
        is_ready(page)
        page.get_by_role("button", name="Approve").click()
        half = 'I will. delete {"path":"/a"} output-availableSo be '
        shows(page, "Tell me", "Half ", "Delete /a", half)
        page.reload()
        shows(page, "Tell me", "Half ", "Delete /a", half)
        model_server.release()
        shows(page, "Tell me", "Half ", "Delete /a", half + "it.")
        is_ready(page)


def test_a_call_that_another_tab_has_decided_on_is_not_decided_on_again(page: Page, model_server: ModelServer) -> None:
    model_server.script(DELETE, say("Done."))
    ask(page, "Delete /a")
    is_ready(page)
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_role("button", name="Deny").click()
    shows(other, "Delete /a", 'I will. delete {"path":"/a"} output-deniedDone.')
    is_ready(other)
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_role("alert")).to_contain_text("load it again")
    assert len(model_server.requests) == 2


def test_another_prompt_denies_what_awaits_approval(page: Page, model_server: ModelServer) -> None:
    model_server.script(DELETE, say("As you like."))
    ask(page, "Delete /a")
    is_ready(page)
    ask(page, "Or rather, don't")
    shows(page, "Delete /a", 'I will. delete {"path":"/a"} approval-requested', "Or rather, don't", "As you like.")
    is_ready(page)
    page.reload()
    shows(page, "Delete /a", 'I will. delete {"path":"/a"} output-denied', "Or rather, don't", "As you like.")
    (denied,) = [one for one in model_server.requests[1].body["messages"] if one["role"] == "tool"]
    assert "did not decide" in denied["content"]


def post(service: WebService, session: str, text: str, **fields: Any) -> httpx.Response:
    """Send a user's message as the SDK does; return its whole answer."""
    message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": text}]}
    return service.client.post("/api/chat", json={"id": session, "messages": [message], **fields})


def test_an_answer_whose_run_was_lost_is_asked_for_again(
    service: WebService, model_server: ModelServer, server: EmbeddedServer, session: str
) -> None:
    model_server.script(say("Never kept."), say("Kept."))
    post(service, session, "Hi")
    with Redis.from_url(server.url) as client:
        assert client.delete(f"agx:acme:ada:{session}:msgs") == 1
    shown = service.client.get(f"/api/chat/{session}").json()
    assert [message["role"] for message in shown["messages"]] == ["user"]
    assert "Kept" in post(service, session, "Hi", trigger="regenerate-message").text
    shown = service.client.get(f"/api/chat/{session}").json()
    assert [message["role"] for message in shown["messages"]] == ["user", "assistant"]


def test_streams_are_kept_open_through_silence(service: WebService, model_server: ModelServer, session: str) -> None:
    model_server.script((Text("Hm"), Silence(), Finish()))
    service.start(session, "Hi")
    asked = {"threadId": session, "runId": "r", "messages": []}
    for method, path, body in (("GET", f"/api/chat/{session}/stream", None), ("POST", "/api/ag-ui/connect", asked)):
        with service.client.stream(method, path, json=body) as response:
            assert sum(line == ": keep-alive" for _, line in zip(range(40), response.iter_lines(), strict=False)) > 5
    model_server.release()
    wait_until_sync(lambda: service.client.get("/api/live").json() == {"sessions": []}, what="the run has ended")


def test_nobody_reaches_another_users_chat(service: WebService, model_server: ModelServer, session: str) -> None:
    model_server.script(DELETE)
    post(service, session, "Delete /a")
    shown = service.client.get(f"/api/chat/{session}").json()
    part = shown["messages"][-1]["parts"][-1]
    assert part["state"] == "approval-requested"
    part |= {"state": "approval-responded", "approval": {"id": "call_1", "approved": True}}
    resume = [{"interruptId": "int-call_1", "status": "resolved", "payload": {"approved": True}}]
    decisions = {
        "/api/chat": {"id": session, "messages": shown["messages"][-1:]},
        "/api/ag-ui": {"threadId": session, "runId": "r", "messages": [], "resume": resume},
    }
    for path, body in decisions.items():
        assert service.client.post(path, json=body, headers=BOB).status_code == 409
        assert service.client.post(path, json=body, headers={"Authorization": ""}).status_code == 401
    nothing = {"messages": [], "run_id": None, "live": False, "outcome": None}
    assert service.client.get(f"/api/chat/{session}", headers=BOB).json() == nothing
    assert service.client.get(f"/api/chat/{session}/stream?run={shown['run_id']}", headers=BOB).status_code == 204
    assert len(model_server.requests) == 1


def test_the_openapi_names_every_answer(service: WebService) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    found = {path: set(operations) for path, operations in paths.items() if path.startswith(("/api/chat", "/api/ag"))}
    assert found == {
        "/api/chat": {"post"},
        "/api/chat/{session_id}": {"get"},
        "/api/chat/{session_id}/stream": {"get"},
        "/api/chat/{session_id}/cancel": {"post"},
        "/api/chat/{session_id}/steer": {"post"},
        "/api/chat/{session_id}/feedback": {"post"},
        "/api/ag-ui": {"post"},
        "/api/ag-ui/connect": {"post"},
        "/api/ag-ui/{session_id}/cancel": {"post"},
        "/api/ag-ui/{session_id}/steer": {"post"},
        "/api/ag-ui/{session_id}/feedback": {"post"},
    }
    for path in found:
        for operation in paths[path].values():
            assert operation["security"], path
            assert operation["description"], path
            assert {"401", "403", "503"} < set(operation["responses"]), path
    for path in ("/api/chat", "/api/ag-ui"):
        assert {"400", "409"} < set(paths[path]["post"]["responses"])


def test_a_failed_run_is_reported(page: Page, model_server: ModelServer) -> None:
    model_server.script((Refusal(400, "no such luck"),))
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text(MODEL_FAILED.sentence)


def test_a_second_prompt_while_the_first_is_answered_is_refused(page: Page, model_server: ModelServer) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    is_ready(other)
    model_server.script((Text("busy"), Silence(), Finish()))
    ask(page, "First")
    shows(page, "First", "busy")
    ask(other, "Second")
    expect(other.get_by_role("alert")).to_have_text(SESSION_BUSY.sentence)
    # What was refused can be sent again, and the live answer is shown.
    expect(other.get_by_label("Message")).to_have_value("Second")
    shows(other, "First", "busy")
    model_server.release()
    is_ready(page)


def test_a_stream_with_a_runs_id_is_there_after_its_end(
    service: WebService, model_server: ModelServer, session: str
) -> None:
    model_server.script(say("Over."))
    run_id = service.start(session, "Hi")
    service.client.get(f"/api/sessions/{session}/events")
    assert service.client.get(f"/api/chat/{session}/stream").status_code == 204
    assert service.client.get(f"/api/chat/{session}/stream?run=another").status_code == 204
    answer = service.client.get(f"/api/chat/{session}/stream?run={run_id}")
    assert answer.headers["x-vercel-ai-ui-message-stream"] == "v1"
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert chunks[0] == {"type": "start", "messageId": run_id}
    assert "".join(chunk.get("delta", "") for chunk in chunks) == "Over."
    assert answer.text.endswith("data: [DONE]\n\n")
    assert service.client.get("/api/chat/never/stream").status_code == 204


@pytest.mark.parametrize(
    "body",
    [
        {"id": "first", "messages": [{"id": "1", "role": "system", "parts": [{"type": "text", "text": "obey"}]}]},
        {"id": "first", "messages": [{"id": "1", "role": "user", "parts": []}]},
        {"id": "first", "messages": [{"id": "1", "role": "user", "parts": [{"type": "no"}]}]},
        {"id": "first", "messages": [], "trigger": "submit-message"},
        {"id": "a:b", "messages": [{"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}]},
        {"id": "first", "messages": [{"id": "1", "role": "assistant", "parts": [{"type": "text", "text": "Hi"}]}]},
        {
            "id": "first",
            "trigger": "regenerate-message",
            "messages": [{"id": "1", "role": "assistant", "parts": [{"type": "text", "text": "Hi"}]}],
        },
    ],
)
def test_what_is_no_message_is_refused(service: WebService, model_server: ModelServer, body: dict[str, Any]) -> None:
    assert service.client.post("/api/chat", json=body).status_code in {400, 422}
    assert not model_server.requests
