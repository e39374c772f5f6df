"""Fixtures of the sidecar's tests: replicas that end with the test, and the queues they read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from redis import Redis
from support.replica import Queue, Replica, StartReplica
from support.visitor import TOKEN, OpenConsole, Visitor, console_port


@pytest.fixture
def queue(redis_url: str) -> Iterator[Queue]:
    """The worker's queues, with a meta."""
    with Redis.from_url(redis_url) as client:
        yield Queue(client)


@pytest.fixture
def start_sidecar(tmp_path: Path) -> Iterator[StartReplica]:
    """Starts sidecars on a URL; environment variables by keyword."""
    started: list[Replica] = []

    def start(url: str, **environment: str) -> Replica:
        replica = Replica(tmp_path / f"replica-{len(started)}", url, **environment)
        started.append(replica)
        return replica

    yield start
    for replica in started:
        if replica.alive:
            replica.end()


@pytest.fixture
def start_replica(start_sidecar: StartReplica, redis_url: str) -> StartReplica:
    """Starts sidecars on the worker's server; environment variables by keyword."""
    return partial(start_sidecar, redis_url)


@pytest.fixture
def open_console(start_replica: StartReplica) -> OpenConsole:
    """Starts a sidecar with a console and returns it with a visitor who is logged in."""

    def start(mode: str = "full", **environment: str) -> tuple[Replica, Visitor]:
        given = {"AGX_CONSOLE": mode, "AGX_CONSOLE_PORT": "0", "AGX_CONSOLE_TOKEN": TOKEN, "AGX_SINKS": "none"}
        sidecar = start_replica(**{**given, **environment})
        visitor = Visitor(console_port(sidecar))
        if environment.get("AGX_CONSOLE_TOKEN", TOKEN):
            assert visitor.log_in().status == 303
        return sidecar, visitor

    return start
