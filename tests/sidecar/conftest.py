"""Fixtures of the sidecar's tests: replicas that end with the test, and the queues they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from replica import Queue, Replica

StartReplica = Callable[..., Replica]


@pytest.fixture
def queue(redis_url: str) -> Iterator[Queue]:
    """The worker's queues, with a meta."""
    queue = Queue(redis_url)
    yield queue
    queue.close()


@pytest.fixture
def start_replica(tmp_path: Path, redis_url: str) -> Iterator[StartReplica]:
    """Starts sidecars on the worker's server, or on the URL given; environment variables by keyword."""
    started: list[Replica] = []

    def start(url: str = redis_url, **environment: str) -> Replica:
        replica = Replica(tmp_path / f"replica-{len(started)}", url, **environment)
        started.append(replica)
        return replica

    yield start
    for replica in started:
        if replica.alive:
            replica.end()
