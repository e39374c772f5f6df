"""The service of the documentation's pages as a process of its own: uvicorn, real HTTP, a model over HTTP."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import httpx
import uvicorn

from agx.embedded.child import draw_ports

from .docs import Blocks
from .forked import Forked
from .model_server import ModelServer
from .terminals import Terminals, is_served
from .waiting import wait_until_sync

ADA = {"Authorization": "Bearer token-of-ada"}  # scope acme, user ada
BOB = {"Authorization": "Bearer token-of-bob"}
_LOG = "uvicorn.log"
_PAGES = {"service": "docs/how-to/fastapi.md", "chat": "docs/how-to/chat.md"}


class WebService:
    """A running service; `client` asks as Ada, `end()` stops it with a signal and returns its exit code."""

    def __init__(self, client: httpx.Client, end: Callable[[Signals], int], log: Path) -> None:
        self.url = str(client.base_url).rstrip("/")
        self.client = client
        self.log = log
        self._end = end

    def start(self, session: str, prompt: str) -> str:
        """Start a run; return its id."""
        answer = self.client.post(f"/api/sessions/{session}/runs", json={"prompt": prompt})
        assert answer.status_code == 202, answer.text
        run_id: str = answer.json()["run_id"]
        return run_id

    def end(self, how: Signals = SIGTERM) -> int:
        """Stop the service with a signal, as patiently as a busy machine needs; return its exit code."""
        return self._end(how)


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

    The process is forked, and runs uvicorn's command. `line`: a page's own, for the shell, that serves it.
    """
    for name, page in _PAGES.items():
        (home / f"{name}.py").write_text(Blocks(page).take("python"))
    for name, content in (extra or {}).items():
        (home / name).write_text(content)
    (port,) = draw_ports(1)
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AGX_REDIS_URL": redis_url,
        "GRACE": "0.2",
        "UVICORN_PORT": str(port),
        **({"MODEL": "test"} if model is None else model.environment),
    }
    with httpx.Client(base_url=url, headers=ADA, timeout=30, trust_env=False) as client:
        if line is None:
            with _forked(module, home, environment, url) as process:
                yield WebService(client, process.end, home / _LOG)
        else:
            with Terminals(home, environment) as terminals:
                child, log = terminals.keep_running(line, url=f"{url}/openapi.json")
                yield WebService(client, partial(terminals.interrupt, child), log)


@contextmanager
def _forked(module: str, home: Path, environment: Mapping[str, str], url: str) -> Iterator[Forked]:
    process = Forked(_serve, module, home, log=home / _LOG, environment={**os.environ, **environment})
    try:
        with httpx.Client(trust_env=False) as client:
            wait_until_sync(lambda: is_served(client, f"{url}/openapi.json", process), what=f"{url} is served")
        yield process
    finally:
        process.end()
        print(f"== {_LOG}\n{process.said}")


def _serve(module: str, home: Path) -> None:
    """Run `uvicorn MODULE:app` in a directory; a warning is an error, as in a terminal of the tests."""
    warnings.simplefilter("error")
    os.chdir(home)
    sys.argv = ["uvicorn", f"{module}:app"]
    uvicorn.main()


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of an SSE response."""
    for line in response.iter_lines():
        if line.startswith("data:") and line != "data: [DONE]":
            yield json.loads(line[5:])


def text_of(found: list[dict[str, Any]]) -> str:
    """Return the text in agx's own events."""
    bodies = [event["body"] for event in found if event["body"].get("part_kind") == "text"]
    return "".join(body.get("content", "") + body.get("content_delta", "") for body in bodies)
