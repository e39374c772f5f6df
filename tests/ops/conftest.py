"""The stack behind the boards, once for each file that needs it, with traffic for as long as they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dashboards.preview.stack import Stack, running
from dashboards.preview.traffic import Traffic


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A server, two sidecars and a Prometheus with our rules, and runs of every outcome."""
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
