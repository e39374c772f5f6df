"""Sidecars as processes of their own, for tests on engines of any shape: started, scraped over HTTP, ended."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from agx.child import Child

from .waiting import wait_until_sync


class Sidecar:
    """One `agx-sidecar` with an environment of its own; `home` is a new directory, its log stays there."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        home.mkdir(parents=True)
        self._log = home / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGX_", "OTEL_"))}
        self._child = Child(
            [sys.executable, "-m", "agx_sidecar"],
            log=self._log,
            home=home / "scratch",
            environment={**inherited, "AGX_HTTP_PORT": "0", **environment},
        )
        self._port: int | None = None

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def values(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float] | None:
        """Return its metrics by name and labels; None where it does not answer."""
        if self._port is None:
            found = wait_until_sync(
                lambda: re.search(r"http://[^ ]+:(\d+)/metrics", self.log), what=f"a port: {self.log}"
            )
            self._port = int(found[1])
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()
        if response.status != 200:
            return None
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def total(self, name: str, **labels: str) -> float:
        """Return the sum over all series of a name that have these labels; -1 where nothing answers."""
        values = self.values()
        if values is None:
            return -1.0
        wanted = set(labels.items())
        return sum(value for (known, has), value in values.items() if known == name and wanted <= has)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; returns its exit code."""
        return self._child.end(how)
