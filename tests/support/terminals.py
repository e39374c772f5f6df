"""The commands of the documentation's pages, run by bash as their readers run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from agx.child import Child
from support.waiting import wait_until_sync


class Terminals:
    """A reader's terminals, all in one directory; a context manager, at whose end each gets its Ctrl-C.

    `environment`: what commands get beside this process's own variables; it may be added to.
    """

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONWARNINGS": "error",
            **environment,
        }
        self._running: list[tuple[Child, Path]] = []

    def run(self, block: str) -> str:
        """Run a block in the foreground; return what it prints."""
        done = subprocess.run(
            self._shell(block),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def keep_running(self, block: str, *more: str) -> tuple[Child, Path]:
        """Run a block in a terminal of its own; return its shell, and where it says what it says.

        `more` is added to its last command.
        """
        log = self.home / f"terminal-{len(self._running)}.log"
        command = self._shell(" ".join([block.strip(), *more]))
        child = Child(command, log=log, home=self.home / "nothing", environment=self.environment)
        self._running.append((child, log))
        return child, log

    def check_install(self, block: str) -> None:
        """Run a block of `pip install`: what it names must be what this environment has; nothing is fetched."""
        said = self.run(f"export PIP_NO_INDEX=1 PYTHONWARNINGS=\n{block}")
        assert "does not provide the extra" not in said, said

    def interrupt(self, child: Child, how: signal.Signals = signal.SIGINT) -> int:
        """Send a signal to whatever a terminal runs; return the exit code once it has ended."""
        if not child.ended:
            os.killpg(child.pid, how)
            wait_until_sync(lambda: child.ended, what="the end of what a terminal runs")
        return child.end()

    def _shell(self, block: str) -> list[str]:
        return ["bash", "-euc", f"cd '{self.home}'\n{block}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child, log in reversed(self._running):
            self.interrupt(child)
            print(f"== {log.name}\n{log.read_text(errors='replace')}")
