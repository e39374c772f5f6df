"""docs/how-to/worker.md: its worker and its web process, real ones, and the agent that somebody else drives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic_ai.models.test import TestModel
from redis.asyncio import Redis
from support.docs import Blocks, every_block
from support.model_server import Finish, ModelServer, Silence, Text, say
from support.recorded import read_recorded
from support.terminals import Terminals
from support.waiting import wait_until, wait_until_sync
from support.web import ADA, BOB, read_events, text_of

import agx
from agx.embedded.child import draw_ports
from agx.facts import schema as facts
from agx.testing import collect

PAGE = "docs/how-to/worker.md"


class Site(Terminals):
    """The page's two processes; `client` asks as Ada."""

    def __init__(self, blocks: Blocks, home: Path, redis_url: str, model: ModelServer) -> None:
        (port,) = draw_ports(1)
        environment = {"AGX_REDIS_URL": redis_url, "UVICORN_PORT": str(port), "GRACE": "0.2", **model.environment}
        super().__init__(home, environment)
        self.url = f"http://localhost:{port}"
        self.client = httpx.Client(base_url=f"{self.url}/api/sessions", headers=ADA, timeout=30, trust_env=False)
        for name in ("agents.py", "web.py"):
            (home / name).write_text(blocks.take("python"))
        self._start_worker = blocks.take("bash", "agx worker agents").replace(":8081", ":0")
        self._start_web = blocks.take("bash", "uvicorn web")

    def start_web(self) -> None:
        self.keep_running(self._start_web, url=f"{self.url}/openapi.json")

    def start_worker(self) -> None:
        self.worker, self.log = self.keep_running(self._start_worker)

    def ask(self, prompt: str) -> str:
        """Submit a question in the chat `first`; returns the run's id."""
        started = self.client.post("/first/runs", json={"prompt": prompt}).raise_for_status().json()
        assert started["begun"]
        run_id: str = started["run_id"]
        return run_id

    def follow(self, until: str = "", after: str = "") -> list[dict[str, Any]]:
        """Return the latest run's events up to its end, or until its text has what is awaited."""
        seen: list[dict[str, Any]] = []
        headers = {"Last-Event-ID": after} if after else {}
        with self.client.stream("GET", "/first/events", headers=headers) as response:
            assert response.status_code == 200, response.read()
            for event in read_events(response):
                seen.append(event)
                if until and until in text_of(seen):
                    break
        return seen


@contextmanager
def running_site(blocks: Blocks, home: Path, redis_url: str, model: ModelServer) -> Iterator[Site]:
    with Site(blocks, home, redis_url, model) as site, site.client:
        site.start_worker()
        site.start_web()
        yield site


@pytest.fixture
def site(redis_url: str, model_server: ModelServer, tmp_path: Path) -> Iterator[Site]:
    with running_site(Blocks(PAGE), tmp_path, redis_url, model_server) as site:
        yield site


async def test_every_block(configured: Redis, redis_url: str, model_server: ModelServer, tmp_path: Path) -> None:
    with every_block("docs/how-to/worker.md") as page:
        # The last one first: it is held against all facts there are.
        await an_agent_that_somebody_else_drives(page.take("python", "AgxCapability"), configured)
        queue = (page.take("python", "taskiq"), page.take("bash", "taskiq"))
        with running_site(page, tmp_path, redis_url, model_server) as site:
            site.run(page.take("bash", "pip install"))
            model_server.script(say("Hello from the worker"))
            said = site.run(page.take("bash", "curl").replace("http://localhost:8000", site.url))
            events = [json.loads(line[len("data: ") :]) for line in said.splitlines() if line.startswith("data: ")]
            assert text_of(events) == "Hello from the worker"
            assert f'"run_id":"{events[0]["body"]["run_id"]}","begun":true' in said
            assert said.endswith('{"cancelled":false}')
            await a_run_is_submitted(page.take("python", "submit"), model_server)
            await a_queue_s_worker_is_killed(site, *queue, model_server)


async def a_run_is_submitted(code: str, model_server: ModelServer) -> None:
    model_server.script(say("Hello once more"))
    page: dict[str, Any] = {}
    exec("import agx\nasync def submit():\n    " + code + "    return run_id", page)
    run_id = await page["submit"]()

    async def has_answered() -> bool:
        events = await collect("acme", "ada", "first")
        return events[0]["body"]["run_id"] == run_id and text_of(events) == "Hello once more"

    await wait_until(has_answered, what="the submitted run has ended")


async def a_queue_s_worker_is_killed(site: Site, code: str, command: str, model_server: ModelServer) -> None:
    """A job of taskiq starts a run; its process is killed, and `agx worker` continues the run."""
    assert code.count("Config(redis=state.redis") == 1
    (site.home / "tasks.py").write_text(
        code.replace("Config(redis=state.redis", "Config(redis=state.redis, lease_ttl=4")
    )
    queue, log = site.keep_running(command)
    model_server.script((Text("half"), Silence()), say("The whole answer"))
    kick = "import asyncio, tasks; asyncio.run(tasks.answer.kiq('acme', 'ada', 'first', 'Again'))"
    site.run(f'python -W ignore -c "{kick}"')
    await asyncio.to_thread(wait_until_sync, lambda: len(model_server.requests) == 3, what=log.read_text())
    seen = await asyncio.to_thread(site.follow, until="half")
    os.killpg(queue.pid, signal.SIGKILL)
    rest = await asyncio.to_thread(site.follow, after=seen[-1]["id"])
    assert [event["type"] for event in rest if event["type"] in ("resume", "end")] == ["resume", "end"]
    assert rest[-1]["body"]["outcome"] == "completed"
    assert text_of(rest) == "The whole answer"


async def an_agent_that_somebody_else_drives(code: str, redis: Redis) -> None:
    page: dict[str, Any] = {}
    exec(code, page)
    with page["agent"].override(model=TestModel(custom_output_text="short")):
        assert await page["summarise"]("acme", "ada", "document-1", "a long text") == "short"
        assert await page["title"]("a long text") == "short"
    assert text_of(await collect("acme", "ada", "document-1")) == "short"
    recorded = await read_recorded(redis)
    assert [ended.agent for ended in recorded.of(facts.RunEnded)] == ["summariser", "summariser"]
    assert [session async for *_, session in agx.q("acme", "ada")] == []


def test_a_second_question_is_followed_from_its_own_beginning(site: Site, model_server: ModelServer) -> None:
    model_server.script(say("One."), say("Two."))
    for prompt, answer in (("First", "One."), ("Second", "Two.")):
        run_id = site.ask(prompt)
        events = site.follow()
        assert events[0]["body"]["run_id"] == run_id
        assert text_of(events) == answer
    asked = [message["content"] for message in model_server.requests[1].body["messages"]]
    assert asked == ["First", "One.", "Second"]
    behind = {"Last-Event-ID": events[-1]["id"]}
    wait_until_sync(
        lambda: site.client.get("/first/events", headers=behind).status_code == 204,
        what="the lease is given back, and nothing more is to come",
    )


def test_a_run_is_cancelled_from_the_web(site: Site, model_server: ModelServer) -> None:
    model_server.script((Text("never"), Silence()))
    site.ask("Go on")
    seen = site.follow(until="never")
    assert site.client.post("/first/runs", json={"prompt": "Me too"}).status_code == 409
    assert site.client.post("/first/cancel", headers=BOB).json() == {"cancelled": False}
    assert site.client.post("/first/cancel").json() == {"cancelled": True}
    rest = site.follow(after=seen[-1]["id"])
    assert rest[-1]["body"]["outcome"] == "cancelled"


def test_after_sigterm_the_next_worker_repeats_the_request_under_way(site: Site, model_server: ModelServer) -> None:
    model_server.script((Text("half"), Silence()), say("The whole answer"))
    site.ask("Go on")
    seen = site.follow(until="half")
    assert site.interrupt(site.worker, signal.SIGTERM) == 0
    assert "Traceback" not in site.log.read_text()
    site.start_worker()
    rest = site.follow(after=seen[-1]["id"])
    assert rest[-1]["body"]["outcome"] == "completed"
    assert text_of(rest) == "The whole answer"


def test_a_run_ends_within_the_grace_of_sigterm(site: Site, model_server: ModelServer) -> None:
    site.environment["GRACE"] = "20"
    site.interrupt(site.worker)
    site.start_worker()
    model_server.script((Text("one "), Silence(), Text("two"), Finish()))
    site.ask("Go on")
    site.follow(until="one ")
    os.killpg(site.worker.pid, signal.SIGTERM)
    model_server.release()
    assert site.interrupt(site.worker, signal.SIGTERM) == 0
    events = site.follow()
    assert [event["type"] for event in events if event["type"] in ("resume", "end")] == ["end"]
    assert events[-1]["body"]["outcome"] == "completed"


def test_wrong_input_is_refused(site: Site) -> None:
    assert site.client.post("/a:b/runs", json={"prompt": "Hi"}).status_code == 422
    assert site.client.post("/first/runs", json={"prompt": ""}).status_code == 422
    assert site.client.get("/first/events", headers={"Last-Event-ID": "no"}).status_code == 422
    assert site.client.get("/first/events", headers={"Authorization": "Bearer no"}).status_code == 401
