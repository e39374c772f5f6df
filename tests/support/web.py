"""The service of the documentation's pages as a process of its own: uvicorn, real HTTP, a model over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import httpx

from agx.embedded.child import draw_ports

from .docs import Blocks
from .model_server import ModelServer
from .terminals import Terminals

ADA = {"Authorization": "Bearer token-of-ada"}  # scope acme, user ada
BOB = {"Authorization": "Bearer token-of-bob"}
_PAGES = {"service": "docs/how-to/fastapi.md", "chat": "docs/how-to/chat.md"}


class WebService:
    """A running service; `client` asks as Ada."""

    def __init__(self, terminals: Terminals, line: str, client: httpx.Client) -> None:
        self.url = str(client.base_url).rstrip("/")
        self.client = client
        self._terminals = terminals
        self._child, self.log = terminals.keep_running(line, url=f"{self.url}/openapi.json")

    def start(self, session: str, prompt: str) -> str:
        """Start a run; return its id."""
        answer = self.client.post(f"/api/sessions/{session}/runs", json={"prompt": prompt})
        assert answer.status_code == 202, answer.text
        run_id: str = answer.json()["run_id"]
        return run_id

    def end(self, how: Signals = SIGTERM) -> int:
        """Stop the service with a signal, as patiently as a busy machine needs; return its exit code."""
        return self._terminals.interrupt(self._child, how)


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
        (home / f"{name}.py").write_text(Blocks(page).take("python"))
    for name, content in (extra or {}).items():
        (home / name).write_text(content)
    (port,) = draw_ports(1)
    environment = {
        "AGX_REDIS_URL": redis_url,
        "GRACE": "0.2",
        "UVICORN_PORT": str(port),
        **({"MODEL": "test"} if model is None else model.environment),
    }
    with (
        Terminals(home, environment) as terminals,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=ADA, timeout=30, trust_env=False) as client,
    ):
        yield WebService(terminals, line or f"uvicorn {module}:app", client)


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of an SSE response."""
    for line in response.iter_lines():
        if line.startswith("data:") and line != "data: [DONE]":
            yield json.loads(line[5:])


def text_of(found: list[dict[str, Any]]) -> str:
    """Return the text in agx's own events."""
    bodies = [event["body"] for event in found if event["body"].get("part_kind") == "text"]
    return "".join(body.get("content", "") + body.get("content_delta", "") for body in bodies)
