"""The shell blocks of the documentation, run by bash as their readers run them, where they harm nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import httpx

from agx.embedded.child import Child

from .docs import ROOT
from .waiting import wait_until_sync

_ENVIRONMENT = {
    # So that a page's commands are those of the environment that the tests run in.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    # What these would change is only said: pip has to find everything installed, and make names its commands. The
    # package is not on an index that a test could rely on, and a demo does not end by itself.
    "PIP_DRY_RUN": "1",
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "MAKEFLAGS": "n",
    # pip warns of its own parts.
    "PYTHONWARNINGS": "error,ignore:pkg_resources is deprecated:DeprecationWarning",
}
# What pages fetch from the repository is this tree's.
_REPOSITORY = "https://raw.githubusercontent.com/opale/pydantic-ai-stream/main"


class Terminals:
    """A reader's terminals, all in one directory; a context manager, at whose end each gets its Ctrl-C.

    `environment`: what commands get beside this process's own variables; it may be added to.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.environment = {**os.environ, **_ENVIRONMENT, **(environment or {})}
        self._running: list[tuple[Child, Path]] = []

    def run(self, block: str) -> str:
        """Run a block to its end; return what it prints. pip and make only say what they would do.

        A warning fails it too: of an extra that does not exist pip says no more than that.
        """
        done = subprocess.run(
            self._shell(block), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        assert "WARNING" not in done.stderr, f"{block}\n{done.stderr}"
        return done.stdout

    def keep_running(self, block: str, *more: str, url: str = "") -> tuple[Child, Path]:
        """Run a block in a terminal of its own; return its last command, and where it says what it says.

        `more` is added to the last command. `url`: what it serves, which is waited for.
        """
        log = self.home / f"terminal-{len(self._running)}.log"
        command = self._shell(" ".join([block.strip(), *more]))
        child = Child(command, log=log, home=self.home / "nothing", environment=self.environment)
        self._running.append((child, log))
        if url:
            with httpx.Client(trust_env=False) as client:
                wait_until_sync(lambda: is_served(client, url, child), what=f"{url} is served")
        return child, log

    def interrupt(self, child: Child, how: signal.Signals = signal.SIGINT) -> int:
        """Send a signal to whatever a terminal runs; return the exit code once it has ended."""
        try:
            if not child.ended:
                os.killpg(child.pid, how)
                wait_until_sync(lambda: child.ended, what="the end of what a terminal runs")
        finally:
            code = child.end()
        return code

    def _shell(self, block: str) -> list[str]:
        return ["bash", "-euc", f"cd '{self.home}'\n{block.replace(_REPOSITORY, ROOT.as_uri())}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child, log in reversed(self._running):
            self.interrupt(child)
            print(f"== {log.name}\n{log.read_text(errors='replace')}")


class Process(Protocol):
    @property
    def ended(self) -> bool: ...


def is_served(client: httpx.Client, url: str, process: Process) -> bool:
    """Return whether a process serves a page.

    Raises:
        RuntimeError: it has ended.
    """
    if process.ended:
        raise RuntimeError(f"what should serve {url} has ended")
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False
