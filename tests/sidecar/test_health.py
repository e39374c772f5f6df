"""The probes while the main loop hangs: they are answered by another thread, and liveness fails."""

from __future__ import annotations

import asyncio
import threading
from http.client import HTTPConnection

import pytest
from support.waiting import wait_until

from agx.redis.address import parse_redis
from agx_sidecar import health
from agx_sidecar.health import Health
from agx_sidecar.http import HttpServer
from agx_sidecar.link import Link, open_client
from agx_sidecar.metrics.series import Series
from agx_sidecar.pages import Pages


def status(port: int, path: str) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


async def _is_alive(port: int) -> bool:
    return await asyncio.to_thread(status, port, "/healthz") == 200


async def test_a_main_loop_that_hangs_is_not_alive_and_is_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ALIVE_WITHIN", 0.3)
    monkeypatch.setattr(health, "_TICK", 0.01)
    link = Link(open_client(parse_redis("redis://127.0.0.1:1")))
    probes = Health(link)
    pages = Pages(probes, link, Series(), None)
    server = HttpServer("127.0.0.1", 0, pages.make_app(), port_variable="PORT")
    server.start()
    ticking = asyncio.create_task(probes.tick())
    seen: list[int] = []

    def ask_until_it_fails() -> None:
        while not seen or seen[-1] == 200:
            seen.append(status(server.port, "/healthz"))

    asking = threading.Thread(target=ask_until_it_fails)
    try:
        assert await asyncio.to_thread(status, server.port, "/healthz") == 200
        assert await asyncio.to_thread(status, server.port, "/metrics") == 200
        asking.start()
        asking.join(30)  # the loop hangs here
        assert seen[-1] == 503
        await wait_until(lambda: _is_alive(server.port))
    finally:
        await asyncio.to_thread(server.close)
        ticking.cancel()
        await link.client.aclose()
