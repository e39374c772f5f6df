"""The service of the documentation's pages as a process of its own: uvicorn, real HTTP, a model over HTTP."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import httpx

from agx.child import Child, draw_ports
from support.docs import code_blocks
from support.model_server import MODEL, ModelServer
from support.shell import PATH, serve
from support.waiting import wait_until_sync

ADA = {"Authorization": "Bearer token-of-ada"}  # scope acme, user ada
BOB = {"Authorization": "Bearer token-of-bob"}
_PAGES = {"service": "how-to/fastapi.md", "chat": "how-to/chat.md"}


class WebService:
    """A running service; `client` asks as Ada."""

    def __init__(self, child: Child, url: str, client: httpx.Client, log: Path) -> None:
        self.child = child
        self.url = url
        self.client = client
        self.log = log

    def start(self, session: str, prompt: str) -> str:
        """Start a run; return its id."""
        answer = self.client.post(f"/api/sessions/{session}/runs", json={"prompt": prompt})
        assert answer.status_code == 202, answer.text
        run_id: str = answer.json()["run_id"]
        return run_id

    def end(self, how: Signals = SIGTERM) -> int:
        """Stop the service with a signal, as patiently as a busy machine needs; return its exit code."""
        os.kill(self.child.pid, how)
        wait_until_sync(lambda: self.child.ended, what="the service has ended")
        return self.child.end(how)


@contextmanager
def running_service(
    module: str,
    home: Path,
    redis_url: str,
    model: ModelServer | None,
    extra: Mapping[str, str] | None = None,
    line: str | None = None,
) -> Iterator[WebService]:
    """Serve `service` or `chat`, the first Python block of their pages; without a model, pydantic-ai's TestModel.

    `line`: a page's own, for the shell, that serves it.
    """
    for name, page in _PAGES.items():
        (home / f"{name}.py").write_text(code_blocks(page, "python")[0])
    for name, content in (extra or {}).items():
        (home / name).write_text(content)
    (port,) = draw_ports(1)
    environment = {
        **os.environ,
        "REDIS_URL": redis_url,
        "MODEL": "test" if model is None else f"openai-chat:{MODEL}",
        "OPENAI_BASE_URL": "" if model is None else model.base_url,
        "OPENAI_API_KEY": "test",
        "GRACE": "0.2",
        "PYTHONPATH": str(home),
        "PYTHONWARNINGS": "error",
        "UVICORN_PORT": str(port),
        "PATH": PATH,
    }
    log = home / "service.log"
    serving = [sys.executable, "-m", "uvicorn", f"{module}:app"] if line is None else serve(line)
    child = Child(serving, log=log, home=home / "nothing", environment=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, headers=ADA, timeout=30, trust_env=False) as client:
            wait_until_sync(lambda: _answers(client, child, log), what="the service is up")
            yield WebService(child, url, client, log)
    finally:
        if not child.ended:
            child.end()
        print(log.read_text())


def _answers(client: httpx.Client, child: Child, log: Path) -> bool:
    if child.ended:
        raise RuntimeError(f"the service ended: {log.read_text()}")
    try:
        return client.get("/openapi.json").status_code == 200
    except httpx.TransportError:
        return False


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of an SSE response."""
    for line in response.iter_lines():
        if line.startswith("data:") and line != "data: [DONE]":
            yield json.loads(line[5:])


def text_of(found: list[dict[str, Any]]) -> str:
    """Return the text in agx's own events."""
    bodies = [event["body"] for event in found if event["body"].get("part_kind") == "text"]
    return "".join(body.get("content", "") + body.get("content_delta", "") for body in bodies)
