"""The router as docs/how-to/fastapi.md has it: a process under uvicorn, real HTTP, a model over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from pydantic_ai import Agent
from redis import Redis
from support.docs import every_block
from support.model_server import Finish, ModelServer, Silence, Text, say
from support.terminals import Terminals
from support.web import ADA, BOB, WebService, read_events, running_service, text_of

from agx.error_codes import CLIENT_OUTDATED
from agx.sessions.redis_session import RedisSessions
from agx.web import make_ag_ui_router, make_router, make_vercel_ai_router


@pytest.fixture
def service(redis_url: str, model_server: ModelServer, tmp_path: Path) -> Iterator[WebService]:
    with running_service("service", tmp_path, redis_url, model_server) as service:
        yield service


def until_text(service: WebService, session: str, text: str) -> str:
    """Follow a run until it has said something; return the id of that event, and go away."""
    with service.client.stream("GET", f"/api/sessions/{session}/events") as response:
        seen = []
        for event in read_events(response):
            seen.append(event)
            if text_of(seen) == text:
                return str(event["id"])
    raise AssertionError(f"it never said {text!r}")


def test_a_run_is_started_followed_and_kept(service: WebService, model_server: ModelServer) -> None:
    model_server.script(say("Hello there"), say("Hello again"))
    run_id = service.start("first", "Hi")
    with service.client.stream("GET", "/api/sessions/first/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        found = list(read_events(response))
    assert found[0]["body"]["run_id"] == run_id
    assert text_of(found) == "Hello there"
    assert found[-1]["body"]["outcome"] == "completed"

    again = service.start("first", "And now?")
    assert again != run_id
    service.client.get("/api/sessions/first/events")
    kept = service.client.get("/api/sessions/first/messages").json()
    assert [part["content"] for message in kept["messages"] for part in message["parts"]] == [
        "Hi",
        "Hello there",
        "And now?",
        "Hello again",
    ]
    assert (kept["run_id"], kept["live"]) == (again, False)
    (listed,) = service.client.get("/api/sessions").json()["conversations"]
    assert (listed["session_id"], listed["title"]) == ("first", "Hi")


def test_events_say_when_to_retry_resume_and_end_with_204(service: WebService, model_server: ModelServer) -> None:
    model_server.script(say("one two three"))
    service.start("s", "Count")
    path = "/api/sessions/s/events"
    whole = service.client.get(path)
    assert whole.text.startswith("retry: 1000\n\n")
    found = list(read_events(whole))
    resumed = service.client.get(path, headers={"Last-Event-ID": found[2]["id"]})
    assert list(read_events(resumed)) == found[3:]
    assert service.client.get(path, headers={"Last-Event-ID": found[-1]["id"]}).status_code == 204
    assert service.client.get("/api/sessions/never/events").status_code == 204
    assert service.client.get(path, headers={"Last-Event-ID": "nonsense"}).status_code == 422


def test_a_silent_live_run_is_joined_at_once_and_going_away_cancels_nothing(
    service: WebService, model_server: ModelServer
) -> None:
    model_server.script((Text("half "), Silence(), Text("and half"), Finish()))
    service.start("s", "Go on")
    cursor = until_text(service, "s", "half ")
    assert service.client.get("/api/live").json() == {"sessions": ["s"]}
    headers = {"Last-Event-ID": cursor}
    with service.client.stream("GET", "/api/sessions/s/events", headers=headers) as response:
        # The answer's head is there although nothing has been said since.
        assert response.status_code == 200
        model_server.release()
        rest = list(read_events(response))
    assert text_of(rest) == "and half"
    assert rest[-1]["body"]["outcome"] == "completed"
    assert service.client.get("/api/live").json() == {"sessions": []}


def test_a_prompt_is_in_the_conversation_while_it_is_answered(service: WebService, model_server: ModelServer) -> None:
    model_server.script(say("Yes."), (Text("Hm"), Silence(), Finish()))
    service.start("s", "First?")
    service.client.get("/api/sessions/s/events")
    run_id = service.start("s", "Second?")
    until_text(service, "s", "Hm")
    kept = service.client.get("/api/sessions/s/messages").json()
    assert [part["content"] for message in kept["messages"] for part in message["parts"]] == [
        "First?",
        "Yes.",
        "Second?",
    ]
    assert (kept["run_id"], kept["live"]) == (run_id, True)
    model_server.release()


def test_instructions_are_not_for_the_browser(redis_url: str, model_server: ModelServer, tmp_path: Path) -> None:
    instructed = """
from chat import agent, app
agent.instructions(lambda: "SECRET instructions")
agent.system_prompt(lambda: "SECRET system prompt")
"""
    model_server.script(say("Hello"))
    with running_service("instructed", tmp_path, redis_url, model_server, {"instructed.py": instructed}) as service:
        service.start("s", "Hi")
        service.client.get("/api/sessions/s/events")
        joined = {"threadId": "s", "runId": "r", "messages": []}
        found = [
            service.client.get("/api/sessions/s/messages").text,
            service.client.get("/api/chat/s").text,
            service.client.post("/api/ag-ui/connect", json=joined).text,
        ]
    assert "SECRET" in str(model_server.requests[0].body)
    for text in found:
        assert "Hello" in text
        assert "SECRET" not in text


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (rb'{"prompt": "\ud800"}', 422, "request_unreadable"),
        (rb'{"prompt": 1e999}', 422, "request_unreadable"),
        (b'{"prompt": ', 422, "request_unreadable"),
        (b'{"prompt": "\xff"}', 422, "request_unreadable"),
        (b"[" * 100_000, 422, "request_unreadable"),
        (b'{"prompt": "' + b"x" * 3_000_000 + b'"}', 413, "request_too_large"),
    ],
    ids=["surrogate", "infinity", "cut", "no utf-8", "deep", "large"],
)
def test_a_body_that_is_refused_gets_a_sentence_and_a_code(
    service: WebService, body: bytes, status: int, code: str
) -> None:
    for content in (body, iter([body])):  # with its size announced, and in chunks
        refused = service.client.post(
            "/api/sessions/s/runs", content=content, headers={"Content-Type": "application/json"}
        )
        assert refused.status_code == status, refused.text
        assert refused.json()["code"] == code
        assert refused.json()["detail"].startswith("The request ")


def test_an_agx_js_that_is_too_old_gets_a_sentence(service: WebService) -> None:
    for version, status in (("0", 400), ("1", 200)):
        assert service.client.get("/api/live", headers={"Agx-Client": version}).status_code == status
    refused = service.client.get("/api/sessions/s/events", headers={"Agx-Client": "0"})
    assert refused.json() == {"detail": CLIENT_OUTDATED.sentence, "code": CLIENT_OUTDATED.code}


def test_a_start_that_asks_for_events_is_answered_with_them(service: WebService, model_server: ModelServer) -> None:
    model_server.script((Text("Hello"),))
    asked = {"json": {"prompt": "Say hello"}, "headers": {"Accept": "text/event-stream"}}
    with service.client.stream("POST", "/api/sessions/s/runs", **asked) as response:  # type: ignore[arg-type]
        assert (response.status_code, response.headers["Content-Type"][:17]) == (200, "text/event-stream")
        events = list(read_events(response))
    with service.client.stream("GET", "/api/sessions/s/events") as response:
        assert events == list(read_events(response))
    assert [event["type"] for event in (events[0], events[-1])] == ["begin", "end"]


def test_cancel_and_a_busy_session(service: WebService, model_server: ModelServer) -> None:
    model_server.script((Text("partial"), Silence()))
    service.start("s", "Go on")
    until_text(service, "s", "partial")
    refused = service.client.post("/api/sessions/s/runs", json={"prompt": "Me too"})
    assert refused.status_code == 409, refused.text
    assert "cancel" in refused.json()["detail"]
    assert refused.json()["code"] == "session_busy"
    assert service.client.post("/api/sessions/s/cancel").json() == {"cancelled": True}
    with service.client.stream("GET", "/api/sessions/s/events") as response:
        end = list(read_events(response))[-1]
    assert (end["body"]["outcome"], end["body"]["reason"]) == ("cancelled", "cancel")
    assert "partial" in (shown := service.client.get("/api/sessions/s/messages")).text
    assert shown.json()["outcome"] == "cancelled"
    assert service.client.post("/api/sessions/s/cancel").json() == {"cancelled": False}


def test_nobody_reaches_what_is_not_theirs(service: WebService, model_server: ModelServer) -> None:
    model_server.script((Text("secret"), Silence(), Finish()))
    service.start("s", "Mine")
    until_text(service, "s", "secret")
    client = service.client
    assert client.post("/api/sessions/s/cancel", headers=BOB).json() == {"cancelled": False}
    assert client.get("/api/live", headers=BOB).json() == {"sessions": []}
    nothing = {"messages": [], "run_id": None, "live": False, "outcome": None, "last_event_id": None}
    assert client.get("/api/sessions/s/messages", headers=BOB).json() == nothing
    assert client.get("/api/sessions/s/events", headers=BOB).status_code == 204
    for wrong in ({"Authorization": "Bearer nobody"}, {"Authorization": ""}):
        for path in ("sessions/s/events", "sessions/s/messages", "live", "sessions"):
            assert client.get(f"/api/{path}", headers=wrong).status_code == 401, path
    assert client.get("/api/live").json() == {"sessions": ["s"]}
    model_server.release()


def test_wrong_ids_are_refused(service: WebService) -> None:
    for wrong in ("a%3Ab", "a%2Ab", "a%0A", "%20", "ä", "x" * 201):
        assert service.client.get(f"/api/sessions/{wrong}/messages").status_code == 422, wrong
        assert service.client.post(f"/api/sessions/{wrong}/runs", json={"prompt": "Hi"}).status_code == 422, wrong


def test_sigterm_ends_runs_cleanly_while_they_are_followed(
    service: WebService, model_server: ModelServer, redis_url: str
) -> None:
    model_server.script((Text("unfinished"), Silence()))
    service.start("s", "Go on")
    with service.client.stream("GET", "/api/sessions/s/events") as response:
        following = read_events(response)
        while "unfinished" not in str(next(following)):
            pass
        # uvicorn hands the signal on once it has shut down in good order.
        assert service.end(SIGTERM) == -SIGTERM, service.log.read_text()
        *_, end = following
    assert (end["type"], end["body"]["outcome"], end["body"]["reason"]) == ("end", "cancelled", "shutdown")
    log = service.log.read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log
    with Redis.from_url(redis_url) as client:
        assert client.exists("agx:acme:ada:s:live") == 0
        kept = client.hget("agx:acme:ada:s:msgs", "messages")
    assert isinstance(kept, bytes)
    assert b"unfinished" in kept


def test_sigterm_closes_streams_of_runs_elsewhere(redis_url: str, model_server: ModelServer, tmp_path: Path) -> None:
    model_server.script((Text("here"), Silence(), Text(" and there"), Finish()))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        running_service("service", tmp_path / "one", redis_url, model_server) as runs,
        running_service("service", tmp_path / "two", redis_url, model_server) as follows,
    ):
        runs.start("s", "Go on")
        cursor = until_text(follows, "s", "here")
        with follows.client.stream("GET", "/api/sessions/s/events") as response:
            lines = response.iter_lines()
            next(lines)
            assert follows.end(SIGTERM) == -SIGTERM
            assert '"end"' not in "".join(lines)
        headers = {"Last-Event-ID": cursor}
        with runs.client.stream("GET", "/api/sessions/s/events", headers=headers) as response:
            model_server.release()
            assert text_of(list(read_events(response))) == " and there"


def test_sigterm_does_not_wait_for_clients_that_take_nothing(service: WebService, redis_url: str) -> None:
    """Their bytes never leave the server, which without more waits for them."""
    with Redis.from_url(redis_url) as redis:
        redis.xadd("agx:acme:ada:s", {"type": "begin", "origin": "opale", "body": '{"run_id": "elsewhere"}'})
        for _ in range(100):
            redis.xadd("agx:acme:ada:s", {"type": "info", "origin": "test", "body": '{"text": "%s"}' % ("x" * 200_000)})
        redis.set("agx:acme:ada:s:live", "elsewhere", ex=60)
        redis.expire("agx:acme:ada:s", 60)
    address = urlsplit(service.url)
    with ExitStack() as stalled:
        for _ in range(5):
            client = stalled.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
            client.connect((address.hostname, address.port))
            head = f"GET /api/sessions/s/events HTTP/1.1\r\nHost: test\r\nAuthorization: {ADA['Authorization']}\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(8) == b"HTTP/1.1"
        assert service.end(SIGTERM) == -SIGTERM, service.log.read_text()
    log = service.log.read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_a_redis_that_is_gone_is_a_503(model_server: ModelServer, tmp_path: Path) -> None:
    with running_service("service", tmp_path, "redis://127.0.0.1:1/0", model_server) as service:
        for path in ("sessions/s/events", "sessions/s/messages", "live", "sessions"):
            answer = service.client.get(f"/api/{path}")
            assert answer.status_code == 503, path
            assert "127.0.0.1" not in answer.text
        assert service.client.post("/api/sessions/s/runs", json={"prompt": "Hi"}).status_code == 503
        assert service.client.post("/api/sessions/s/cancel").status_code == 503
        service.end()


def test_every_block_of_the_page(
    redis_url: str, model_server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with every_block("docs/how-to/fastapi.md") as page, Terminals(tmp_path) as terminals:
        terminals.run(page.take("bash", "pip install"))
        code, line = page.take("python"), page.take("bash", "uvicorn")
        with running_service("service", tmp_path, redis_url, model_server, line=line) as service:
            assert (tmp_path / "service.py").read_text() == code
            model_server.script(say("Hello from the shell"))
            commands = page.take("bash", "curl")
            assert "http://localhost:8000" in commands
            the_commands_work(terminals.run(commands.replace("http://localhost:8000", service.url)))
        (tmp_path / "shop.py").write_text(page.take("python", "make_deps"))
        terminals.run("python -c 'import shop; print(shop.app.openapi()[\"info\"])'")
        page.take("python", "recipes=")  # test_replicas.py runs it
        terminals.run(page.take("bash", "pip install"))
        monkeypatch.chdir(tmp_path)
        asyncio.run(the_database_works(page.take("python")))
        assert (tmp_path / "chats.sqlite").exists()


def the_commands_work(said: str) -> None:
    assert '"run_id"' in said
    events = [json.loads(line[len("data: ") :])["body"] for line in said.splitlines() if line.startswith("data: ")]
    # How many deltas were merged is nobody's promise; the concatenation counts.
    text = "".join(body.get("content", "") + body.get("content_delta", "") for body in events if body.get("part_kind"))
    assert text == "Hello from the shell"
    assert '{"cancelled":false}' in said
    assert '"title":"Say hello"' in said


async def the_database_works(code: str) -> None:
    page: dict[str, Any] = {}
    exec(code, page)
    await page["sessions"].create_table()
    assert await page["sessions"].list("acme", "ada") == []
    await page["engine"].dispose()


def test_the_openapi_names_every_answer(service: WebService) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/api/sessions/{session_id}/runs",
        "/api/sessions/{session_id}/events",
        "/api/sessions/{session_id}/cancel",
        "/api/sessions/{session_id}/steer",
        "/api/sessions/{session_id}/feedback",
        "/api/sessions/{session_id}/decisions",
        "/api/approvals",
        "/api/sessions/{session_id}/messages",
        "/api/sessions",
        "/api/sessions/{session_id}",
        "/api/sessions/{session_id}/title",
        "/api/sessions/{session_id}/branches",
        "/api/live",
    }
    for path, operations in paths.items():
        for operation in operations.values():
            assert operation["security"], path
            assert operation["description"], path
            assert {"401", "403", "503"} < set(operation["responses"]), path
    events = paths["/api/sessions/{session_id}/events"]["get"]
    assert list(events["responses"]["200"]["content"]) == ["text/event-stream"]
    assert "204" in events["responses"]


@pytest.mark.parametrize("make", [make_router, make_vercel_ai_router, make_ag_ui_router])
def test_nobody_gets_in_by_default(make: object) -> None:
    with pytest.raises(TypeError, match="authorize"):
        make(Agent("test"), sessions=RedisSessions())  # type: ignore[operator] # what is tested
    with pytest.raises(TypeError, match="dependency"):
        make(Agent("test"), sessions=RedisSessions(), authorize=None)  # type: ignore[operator]


def test_wrong_ids_from_authorize_never_reach_redis() -> None:
    from fastapi.testclient import TestClient

    app = FastAPI()
    app.include_router(make_router(Agent("test"), sessions=RedisSessions(), authorize=lambda: ("acme", "a:b")))
    with TestClient(app) as client, pytest.raises(ValueError, match="user_id"):
        client.get("/live")


@pytest.mark.parametrize("missing", [("fastapi", "agx.web", "web"), ("sqlalchemy", "agx.sql_session", "sql")])
def test_what_is_missing_is_named(missing: tuple[str, str, str]) -> None:
    package, module, extra = missing
    code = f"""
import sys
import agx
assert not any(name.partition('.')[0] in ('fastapi', 'starlette', 'sqlalchemy') for name in sys.modules)
sys.modules['{package}'] = None
try:
    import {module}
except ImportError as error:
    assert "opale-agent-stream[{extra}]" in str(error), error
else:
    raise SystemExit("it was imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
