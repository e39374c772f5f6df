"""The blocks of docs/how-to/redis.md, each client on its own real servers; test_acl.py holds the users' rules."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.docs import every_block
from support.rigs import MASTER, ClusterRig, SentinelRig, TlsRig

import agx
from agx.testing import collect

pytestmark = pytest.mark.redis7


async def test_every_block(tls: TlsRig, sentinel: SentinelRig, cluster: ClusterRig) -> None:
    for rig in (sentinel, cluster):
        rig.flush()
    with every_block("docs/how-to/redis.md") as page:
        users = page.take("acl") + page.take("acl")
        page.take("acl")  # a part of a line, which test_acl adds to a user
        code = page.take("python")
    tls.load_users(users.replace("\\\n", " "))  # as the page says
    # The same servers, at other addresses.
    places = {
        ":6380": f":{tls.port}",
        "/etc/ssl/redis-ca.crt": tls.ca,
        "26379": sentinel.sentinel_ports[0],
        "26380": sentinel.sentinel_ports[1],
        "mymaster": MASTER,
        "7000": cluster.nodes[0][1],
    }
    for written, place in places.items():
        assert code.count(written) == 1, written
        code = code.replace(written, str(place))
    *statements, configure = ast.parse(code).body
    page_names: dict[str, Any] = {}
    clients = 0
    for statement in statements:
        run(statement, page_names)
        if isinstance(statement, ast.Assign):
            clients += 1
            run(configure, page_names)
            await talk()
            await page_names["redis"].aclose()
    assert clients == 3


def run(statement: ast.stmt, names: dict[str, Any]) -> None:
    exec(compile(ast.Module([statement], type_ignores=[]), "redis.md", "exec"), names)


async def talk() -> None:
    """A run, and its events."""
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    assert [event["type"] for event in await collect(1, 1, "s")][-1] == "end"
    await agx.aclose()
