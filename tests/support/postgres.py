"""A PostgreSQL of the tests' own: Debian's binaries, a fresh cluster in a temporary directory, a socket in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT

from agx.embedded.child import Child
from support.waiting import wait_until_sync

_DEBIAN = Path("/usr/lib/postgresql")


@contextmanager
def running_postgres() -> Iterator[str]:
    """Give SQLAlchemy's URL (asyncpg) of an empty database, gone after the block."""
    binaries = _find_binaries()
    with tempfile.TemporaryDirectory(prefix="agx-pg-") as directory:
        home = Path(directory)
        # It refuses to run as root: Debian's package made a user for it.
        wrapper: list[str] = []
        if os.geteuid() == 0:
            wrapper = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(home, "postgres", "postgres")
        data = str(home / "data")
        initdb = [*wrapper, str(binaries / "initdb"), "--auth=trust", "--username=agx", "--no-sync", "-D", data]
        subprocess.run(initdb, check=True, capture_output=True, timeout=60)
        settings = [f"unix_socket_directories={home}", "listen_addresses=", "fsync=off"]
        command = [*wrapper, str(binaries / "postgres"), "-D", data, *(f"-c{setting}" for setting in settings)]
        log = home / "postgres.log"
        child = Child(command, log=log, home=home)
        try:
            wait_until_sync(lambda: _answers(child, log, home, binaries), what="PostgreSQL is up")
            yield f"postgresql+asyncpg://agx@/postgres?host={home}"
        finally:
            child.end(SIGINT)  # its fast shutdown: the polite one waits for its clients


def _find_binaries() -> Path:
    found = sorted(_DEBIAN.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    assert found, f"PostgreSQL is not in {_DEBIAN}: install it, or deselect with -m 'not postgres'"
    return found[-1].parent


def _answers(child: Child, log: Path, home: Path, binaries: Path) -> bool:
    assert not child.ended or not log.exists(), log.read_text()
    ready = subprocess.run([binaries / "pg_isready", "-h", home, "-q"], check=False, timeout=30)
    return ready.returncode == 0
