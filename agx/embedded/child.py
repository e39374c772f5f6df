"""A child process that dies with its parent, however that dies.

A tiny shell waits at the end of a pipe that only this process holds open, and kills the child when it reads
end-of-file. (Linux's PR_SET_PDEATHSIG was not taken: it fires when the *thread* that started the child ends, and its
hook between fork and exec is unsafe beside gRPC's threads. And this works on macOS too.)
A process that was forked from this one, and lives on, keeps the pipe open, so the children live as long.
"""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_STOP_TIMEOUT = 10.0  # seconds; then SIGKILL

# Below the ephemeral ports (Linux's begin at 32,768, macOS's at 49,152), so that no outgoing connection sits on a port
# while the child that had it is being restarted.
_PORTS = range(10_000, 32_000)

# $1: the child's pid, $2: a directory to remove afterwards.
_GUARD = 'read -r _; kill -9 "$1" 2>/dev/null; rm -rf -- "$2"'


class Child:
    """A running command that writes its output to the file `log`.

    `home`: a directory that is of no use without the child; it is removed if this process dies before `end()`.
    `environment`: None inherits this process's own.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, home: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        with log.open("wb") as output:
            # A session of its own: Ctrl-C in a terminal is for the parent, which still needs its children to shut down.
            self._process = subprocess.Popen(  # noqa: S603 - the command is the caller's
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(  # noqa: S603 - a fixed script
            ["/bin/sh", "-c", _GUARD, "agx-guard", str(self._process.pid), str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the child has ended of itself."""
        return self._process.poll() is not None

    def wait(self, timeout: float) -> bool:
        """Wait so many seconds for the child to end of itself; returns whether it has."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal that ends the child, wait for it, and return its exit code; SIGKILL follows in the end."""
        # The guard first: it must not kill a stranger who got the child's pid.
        self._guard.kill()
        self._guard.communicate()
        self._process.send_signal(how)
        try:
            return self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def draw_ports(count: int) -> list[int]:
    """Return ports to try. None is reserved: only a child that binds one has it."""
    return random.sample(_PORTS, count)
