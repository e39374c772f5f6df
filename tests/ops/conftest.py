"""The stack behind the boards, once for all tests that need it, with traffic for as long as they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dashboards.preview.stack import Stack

# Without the `ops` extra, which CI installs, these tests have nothing to import: they are left out, not skipped.
if not all(find_spec(name) for name in ("grafana_foundation_sdk", "helm_python", "kubernetes_validate", "yaml")):
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A server, two sidecars and a Prometheus with our rules, and runs of every outcome."""
    from dashboards.preview.stack import running  # the extra's, see above
    from dashboards.preview.traffic import Traffic

    with running() as parts:
        traffic = Traffic(parts.redis_url)
        done = threading.Event()

        def work() -> None:
            while not done.wait(0.3):
                traffic.tick()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield parts
        finally:
            done.set()
            thread.join()
            traffic.close()
