"""The FastAPI example as its users run it: a process under uvicorn, real HTTP, a model over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter
from support.model_server import MODEL, Finish, ModelServer, Refusal, Silence, Text, call, say
from support.waiting import wait_until_sync

from agx.embedded.server import EmbeddedServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_sse.py"


class Service:
    """The running example."""

    def __init__(self, process: subprocess.Popen[bytes], client: httpx.Client, database: Path) -> None:
        self.process = process
        self.client = client
        self._database = database

    def ask(self, session: str, prompt: str) -> list[dict[str, Any]]:
        """POST a prompt; return the events up to the end."""
        with self.client.stream("POST", f"/chat/{session}", json={"prompt": prompt}) as response:
            assert response.status_code == 200, response.read()
            return list(events(response))

    def messages(self, session: str) -> list[ModelMessage]:
        with closing(sqlite3.connect(self._database)) as database:
            row = database.execute("select messages from chats where id = ?", (session,)).fetchone()
        return ModelMessagesTypeAdapter.validate_json(row[0]) if row else []


@contextmanager
def serving(redis_url: str, model_server: ModelServer, tmp_path: Path) -> Iterator[Service]:
    """The example as a process; what it logged is shown with a test that fails."""
    database = tmp_path / "chats.sqlite"
    environment = {
        **os.environ,
        "AGX_REDIS_URL": redis_url,
        "DATABASE": str(database),
        "MODEL": f"openai-chat:{MODEL}",
        "OPENAI_BASE_URL": model_server.base_url,
        "OPENAI_API_KEY": "test",
        "GRACE": "0.5",
        "PORT": "0",
    }
    log = tmp_path / "service.log"
    with (
        log.open("wb") as output,
        subprocess.Popen([sys.executable, EXAMPLE], env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            url = wait_until_sync(lambda: address(log, process), what=f"an address in {log}")
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                yield Service(process, client, database)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            print(log.read_text())


@pytest.fixture
def service(redis_url: str, model_server: ModelServer, tmp_path: Path) -> Iterator[Service]:
    with serving(redis_url, model_server, tmp_path) as service:
        yield service


def address(log: Path, process: subprocess.Popen[bytes]) -> str | None:
    """Return where uvicorn listens: the system chose the port."""
    found = re.search(r"Uvicorn running on (http://\S+)", log.read_text())
    if process.poll() is not None:
        raise RuntimeError(f"the service ended: {log.read_text()}")
    return found[1] if found else None


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Parse an SSE stream; each event carries its id twice, as the stream's and in its data."""
    event_id = ""
    for line in response.iter_lines():
        if line.startswith("id:"):
            event_id = line[3:].strip()
        elif line.startswith("data:"):
            event = json.loads(line[5:])
            assert event["id"] == event_id
            yield event


def text_of(found: list[dict[str, Any]]) -> str:
    """Return the text of all parts."""
    bodies = [event["body"] for event in found if event["body"].get("part_kind") == "text"]
    return "".join(body.get("content", "") + body.get("content_delta", "") for body in bodies)


def test_a_prompt_streams_its_answer_and_is_kept(service: Service, model_server: ModelServer) -> None:
    model_server.script(say("Hello from the model"), say("Hello again"))
    found = service.ask("first", "Hi")
    assert [event["type"] for event in (found[0], found[-1])] == ["begin", "end"]
    assert found[-1]["body"]["outcome"] == "completed"
    assert text_of(found) == "Hello from the model"

    again = service.ask("first", "And now?")
    assert text_of(again) == "Hello again"
    asked = [message["content"] for message in model_server.requests[1].body["messages"]]
    assert asked[-3:] == ["Hi", "Hello from the model", "And now?"]
    assert len(service.messages("first")) == 4


def test_a_tool_is_called_and_seen(service: Service, model_server: ModelServer) -> None:
    model_server.script(call("current_time", '{"timezone": ', '"Europe/Lisbon"}'), say("Noon."))
    found = service.ask("tool", "What time is it?")
    kinds = {event["body"]["part_kind"]: event["body"] for event in found if "part_kind" in event["body"]}
    assert kinds["tool-call"]["args"] == {"timezone": "Europe/Lisbon"}
    assert kinds["tool-return"]["tool_outcome"] == "ok"
    assert text_of(found) == "Noon."


def test_events_resume_behind_the_last_one_and_end_with_204(service: Service, model_server: ModelServer) -> None:
    model_server.script(say("one two three"))
    found = service.ask("resumed", "Count")
    path = "/chat/resumed/events"
    with service.client.stream("GET", path) as response:
        assert list(events(response)) == found
    with service.client.stream("GET", path, headers={"Last-Event-ID": found[2]["id"]}) as response:
        assert list(events(response)) == found[3:]
    assert service.client.get(path, headers={"Last-Event-ID": found[-1]["id"]}).status_code == 204
    assert service.client.get("/chat/never-seen/events").status_code == 204


def test_going_away_does_not_cancel_and_the_rest_is_there_later(service: Service, model_server: ModelServer) -> None:
    model_server.script((Text("half "), Silence(), Text("and half"), Finish()))
    with service.client.stream("POST", "/chat/left", json={"prompt": "Go on"}) as response:
        reading = events(response)
        seen = [next(reading)]
        while text_of(seen) != "half ":
            seen.append(next(reading))
    with service.client.stream("GET", "/chat/left/events", headers={"Last-Event-ID": seen[-1]["id"]}) as response:
        model_server.release()
        seen += events(response)
    assert text_of(seen) == "half and half"
    assert seen[-1]["body"]["outcome"] == "completed"


def test_cancel_ends_the_stream_and_keeps_the_partial_answer(service: Service, model_server: ModelServer) -> None:
    model_server.script((Text("partial"), Silence()))
    with service.client.stream("POST", "/chat/stopped", json={"prompt": "Go on"}) as response:
        reading = events(response)
        seen = [next(reading)]
        while not text_of(seen):
            seen.append(next(reading))
        assert service.client.post("/chat/stopped/cancel").json() == {"cancelled": True}
        seen += reading
    assert (seen[-1]["body"]["outcome"], seen[-1]["body"]["reason"]) == ("cancelled", "cancel")
    assert "partial" in repr(service.messages("stopped")[-1])
    assert service.client.post("/chat/stopped/cancel").json() == {"cancelled": False}
    wait_until_sync(lambda: model_server.disconnects, what="the model's connection is closed")


def test_a_second_prompt_on_a_live_session_is_refused(service: Service, model_server: ModelServer) -> None:
    model_server.script((Text("busy"), Silence(), Finish()))
    with service.client.stream("POST", "/chat/busy", json={"prompt": "Go on"}) as response:
        next(events(response))
        refused = service.client.post("/chat/busy", json={"prompt": "Me too"})
        assert refused.status_code == 409, refused.text
        model_server.release()


def test_a_failing_model_is_reported(service: Service, model_server: ModelServer) -> None:
    model_server.script((Refusal(400, "no"),))
    found = service.ask("failed", "Hi")
    assert [event["type"] for event in found[-2:]] == ["error", "end"]
    assert found[-1]["body"]["outcome"] == "failed"


def test_shutdown_ends_runs_and_saves_them(service: Service, model_server: ModelServer) -> None:
    model_server.script((Text("unfinished"), Silence()))
    with service.client.stream("POST", "/chat/shut", json={"prompt": "Go on"}) as response:
        reading = events(response)
        seen = [next(reading)]
        while not text_of(seen):
            seen.append(next(reading))
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) in {0, -signal.SIGTERM}
    assert "unfinished" in repr(service.messages("shut")[-1])


def test_wrong_input_is_refused(service: Service) -> None:
    for path in ("/chat/a:b", "/chat/" + "x" * 65, "/chat/%0A"):
        assert service.client.post(path, json={"prompt": "Hi"}).status_code == 422
        assert service.client.get(f"{path}/events").status_code == 422
        assert service.client.post(f"{path}/cancel").status_code == 422
    assert service.client.post("/chat/s", json={}).status_code == 422
    refused = service.client.get("/chat/s/events", headers={"Last-Event-ID": "not-an-id"})
    assert refused.status_code == 400, refused.text


def test_a_missing_redis_is_said(model_server: ModelServer, tmp_path: Path) -> None:
    with EmbeddedServer() as server, serving(server.url, model_server, tmp_path) as service:
        server.kill()
        refused = service.client.post("/chat/s", json={"prompt": "Hi"})
        assert refused.status_code == 503, refused.text
        assert "Redis could not be reached" in refused.json()["detail"]
        assert model_server.requests == []
