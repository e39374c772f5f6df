"""The fixtures of all tests: one real server per worker, an OTLP receiver, a model over HTTP, and a check for leaks."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
from pydantic_ai.models.openai import OpenAIChatModel
from redis.asyncio import Redis
from support.leaks import leak_checked
from support.model_server import ModelServer, openai_model
from support.otlp import OtlpReceiver

import agx
from agx.embedded.server import EmbeddedServer


def pytest_configure(config: pytest.Config) -> None:
    # How many examples each property is tried with; 10,000 is what docs/reliability.md speaks of.
    hypothesis.settings.register_profile(
        "agx", max_examples=int(os.environ.get("AGX_FUZZ_EXAMPLES") or 100), deadline=None
    )
    hypothesis.settings.load_profile("agx")
    config.addinivalue_line(
        "markers", "redis7: needs Debian's redis-server 7.0 on the PATH; deselect it where there is none"
    )


def pytest_collection_modifyitems() -> None:
    # It imports while the first tests run, so that no test waits for it.
    if "support.forked" in sys.modules:
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """The worker's Valkey. Tests that kill or reconfigure a server start their own."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis7_server() -> Iterator[EmbeddedServer]:
    """The worker's Redis 7.0."""
    binary = shutil.which("redis-server")
    assert binary, "redis-server is not on the PATH: install it, or deselect with -m 'not redis7'"
    with EmbeddedServer(binary=Path(binary)) as server:
        yield server


@pytest.fixture
def redis_url(server: EmbeddedServer) -> Iterator[str]:
    """The URL of the worker's server, emptied; the test fails if it leaves a key without a TTL."""
    with leak_checked(server.url) as url:
        yield url


@pytest.fixture
async def configured(redis_url: str) -> AsyncIterator[Redis]:
    """agx, configured with a client on the worker's server; the client is the test's to use too."""
    async with Redis.from_url(redis_url) as client:
        agx.configure(agx.Config(redis=client))
        yield client
        await agx.aclose()


def _client_variants() -> Iterator[object]:
    for name in ("server", "redis7_server"):
        marks = [pytest.mark.redis7] if name == "redis7_server" else []
        for protocol in (2, 3):
            for decode in (False, True):
                label = f"{'redis7' if marks else 'valkey'}-resp{protocol}-{'str' if decode else 'bytes'}"
                yield pytest.param((name, protocol, decode), marks=marks, id=label)


@pytest.fixture(params=_client_variants())
async def any_client(request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """A client on each server that agx claims, over RESP2 and RESP3, with `decode_responses` on and off."""
    name, protocol, decode = request.param
    server: EmbeddedServer = request.getfixturevalue(name)
    with leak_checked(server.url) as url:
        async with Redis.from_url(url, protocol=protocol, decode_responses=decode) as client:
            yield client


@pytest.fixture
def otlp() -> Iterator[OtlpReceiver]:
    """A collector for HTTP and gRPC."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def shared_model_server() -> Iterator[ModelServer]:
    """The server behind `model_server`, for a service that runs as long as its file."""
    with ModelServer() as server:
        yield server


@pytest.fixture
def model_server(shared_model_server: ModelServer) -> ModelServer:
    """An OpenAI-compatible server whose replies the test scripts."""
    shared_model_server.reset()
    return shared_model_server


@pytest.fixture
async def http_model(model_server: ModelServer) -> AsyncIterator[OpenAIChatModel]:
    """pydantic-ai's OpenAI model, talking to `model_server`."""
    model, client = openai_model(model_server)
    async with client:
        yield model
