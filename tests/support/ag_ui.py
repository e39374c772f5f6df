"""AG-UI's official client in a process of its own, and what it is made of."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .docs import Blocks
from .web import WebService

CHAT = Path(__file__).parents[1] / "acceptance" / "chat"


def run(*command: str, cwd: Path) -> None:
    """Run a command; a failure fails the test."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def install(home: Path) -> None:
    """Install what the package.json in a directory names."""
    run("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", cwd=home)


def install_client(home: Path) -> None:
    """Install the client alone, with the class of docs/how-to/chat.md."""
    versions = json.loads((CHAT / "package.json").read_text())["dependencies"]
    package = {"private": True, "type": "module", "dependencies": {"@ag-ui/client": versions["@ag-ui/client"]}}
    (home / "package.json").write_text(json.dumps(package))
    shutil.copy(CHAT / "ag_ui.js", home)
    (home / "agent.js").write_text(Blocks("docs/how-to/chat.md").take("js", "HttpAgent"))
    install(home)


class AgUi:
    """The official client in a process of its own."""

    def __init__(self, home: Path, service: WebService, *arguments: str) -> None:
        command = ["node", str(home / "ag_ui.js"), f"{service.url}/api/ag-ui", "token-of-ada", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self._lines = self.process.stdout
        self.said: list[dict[str, Any]] = []

    def until(self, kind: str) -> dict[str, Any]:
        """Read up to an event of a kind."""
        for line in self._lines:
            self.said.append(json.loads(line))
            if self.said[-1].get("type") == kind:
                return self.said[-1]
        raise AssertionError(f"{kind} never came: {self.said}")

    def finish(self) -> list[dict[str, Any]]:
        """Read up to the end; return the messages that the client has put together."""
        self.said += [json.loads(line) for line in self._lines]
        assert self.process.wait(30) == 0
        self._lines.close()
        messages: list[dict[str, Any]] = self.said[-1]["messages"]
        return messages

    @property
    def state(self) -> Any:
        """The state that the client has at the end."""
        return self.said[-1]["state"]

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for event in self.said if "type" in event]


def contents(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages if message.get("content")]
