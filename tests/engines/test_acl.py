"""The published ACL rules suffice, and allow nothing more: each allowed command is used, each other key is refused."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults
from redis import Redis as SyncRedis
from redis.asyncio import Redis, RedisCluster
from support.agents import FakeSession, ScopeDeps, ScriptedAgent, call, scripted
from support.otlp import OtlpReceiver
from support.replica import Replica
from support.rigs import ClusterRig, TlsRig
from support.service import running_service
from support.topologies import tls_topology
from support.visitor import Visitor, console_port, leave_call
from support.waiting import wait_until

import agx
from agx.cli.rights import find_rights
from agx.redis import keys
from agx.sessions.redis_session import RedisSessions
from agx.testing import collect

pytestmark = pytest.mark.redis7

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "how-to" / "redis.md"


def published_rules() -> dict[str, str]:
    """Return the rules of the page's ACL files, by user, without their passwords."""
    blocks = re.findall(r"```acl\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = re.findall(r"^user (\S+) on >\S+ (.*)$", "".join(blocks).replace("\\\n", " "), re.MULTILINE)
    assert len(lines) == 5, "a user is missing on the page"
    return {name: " ".join(rule.split()) for name, rule in lines}


@pytest.fixture
def rig(tls: TlsRig) -> TlsRig:
    tls.set_users(published_rules())
    with tls.admin() as admin:
        admin.flushall()
        admin.acl_log_reset()
        admin.script_flush()  # a script that is known already is not sent as a whole
    return tls


async def as_user(rig: TlsRig, user: str) -> AsyncIterator[Redis]:
    client = tls_topology(rig, user).open()
    assert isinstance(client, Redis)
    agx.configure(agx.Config(redis=client, lease_ttl=0.9))
    yield client
    await agx.aclose()
    await client.aclose()


def commands_used(rig: TlsRig) -> set[str]:
    with rig.admin() as admin:
        stats = admin.info("commandstats")
    return {name.removeprefix("cmdstat_") for name in stats}


def commands_allowed(user: str) -> set[str]:
    return set(re.findall(r"\+([\w|]+)", published_rules()[user]))


def check_commands(rig: TlsRig, user: str, refused: Collection[str] = ()) -> None:
    """Nothing that the user tried was refused, unless it was to be; and it used all that it may."""
    with rig.admin() as admin:
        log = [entry for entry in admin.acl_log() if entry["username"] == user and entry["object"] not in refused]
    assert not log
    assert commands_allowed(user) - commands_used(rig) == set(), "allowed, and never used"


async def reset_stats(rig: TlsRig) -> None:
    with rig.admin() as admin:
        admin.config_resetstat()


async def test_service(rig: TlsRig) -> None:
    """Everything a service does, a broken connection included."""
    async for _ in as_user(rig, "agx-service"):
        await reset_stats(rig)
        await _act_as_service(rig, "agx-service")
    check_commands(rig, "agx-service")


async def test_worker(rig: TlsRig) -> None:
    """Everything a worker does: a job of its agent, one that nobody serves, a hand-over, and what a service does."""
    stopped, finishing = ScriptedAgent(silent=True), ScriptedAgent(call_tool=True)
    async for _ in as_user(rig, "agx-worker"):
        await reset_stats(rig)
        await agx.submit(1, 1, "job", agent="support", prompt="Hi")
        await agx.submit(1, 1, "unserved", agent="unknown", prompt="Hi", recover=0)
        async with _working(stopped):
            await stopped.reached.wait()
        async with _working(finishing):
            assert "resume" in await _hear("job")
            assert await _hear("unserved") == ["begin", "error", "end"]
        with rig.admin() as admin:
            assert not admin.zcard("agx::leases:0")
            assert not any(admin.xlen(key) for key in admin.scan_iter("agx::jobs:*"))
        await _act_as_service(rig, "agx-worker")
    check_commands(rig, "agx-worker")


@asynccontextmanager
async def _working(stage: ScriptedAgent) -> AsyncIterator[None]:
    """Have a worker run an agent's jobs; afterwards it hands them over without waiting."""

    async def make_support(job: agx.Job) -> agx.Call:
        deps = ScopeDeps(scope=job.scope_id, user_id=job.user_id, session_id=job.session_id)
        return agx.Call(agx.RedisSession(job.scope_id, job.user_id, job.session_id), stage.agent(), deps)

    worker = agx.Worker({"support": make_support}, grace=0)
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        await task


async def _decide() -> None:
    """Have a run leave a call to others, decide on it, and go on."""
    outputs: Any = [str, DeferredToolRequests]
    agent = Agent(scripted(call("work"), ["Done"]), deps_type=ScopeDeps, output_type=outputs)
    agent.tool_plain(lambda: "worked", name="work", requires_approval=True)
    session, deps = FakeSession(), ScopeDeps(session_id="s4")
    await agx.run(session, agent, "Hi", deps)
    await agx.decide(1, 1, "s4", call_id="c1")
    await agx.run(session, agent, None, deps, deferred_tool_results=DeferredToolResults(approvals={"c1": True}))


async def _act_as_service(rig: TlsRig, user: str) -> None:
    """Run, follow, submit and cancel until all that a service may send was sent."""
    await agx.start(1, 1, "quiet")
    quiet = asyncio.create_task(_hear("quiet"))  # long enough for the hub to probe its connection
    session = agx.RedisSession(scope_id=1, user_id=1, session_id="s")
    run = asyncio.create_task(agx.run(session, ScriptedAgent(call_tool=True).agent(), "Hi", deps=ScopeDeps()))
    await collect(1, 1, "s")
    await run
    await session.load()
    await agx.submit(1, 1, "later", agent="support", prompt="Hi", delay=60)
    _leave_run(rig, "gap")
    assert await agx.is_live(1, 1, "gap")

    stage = ScriptedAgent(silent=True)
    run = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", deps=ScopeDeps(session_id="s2")))
    await stage.reached.wait()
    assert await agx.is_live(1, 1, "s2")
    assert await agx.steer(1, 1, "s2", "now")
    assert (1, 1, "s2") in [found async for found in agx.q(1, 1)]
    with rig.admin() as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    assert await agx.cancel(1, 1, "s2")
    with pytest.raises(agx.AgxCanceledError):
        await run
    await _decide()
    store = RedisSessions()
    await agx.submit(1, 1, "s", agent="support", prompt="Hi", delay=60)
    await agx.branch_session(1, 1, "s", messages=1, sessions=store, branch_id="branch")
    await store.rename(1, 1, "branch", "Named")
    assert await agx.delete_session(1, 1, "s", sessions=store)
    # What a seed client has opened is closed command by command.
    await agx.add(1, 1, "s3", type="info", origin="me")
    await agx.stop(1, 1, "s3")
    await wait_until(lambda: commands_allowed(user) - commands_used(rig) == set())
    await agx.stop(1, 1, "quiet")
    assert (await quiet)[-1] == "end"


async def test_listener(rig: TlsRig) -> None:
    with rig.admin() as admin:
        admin.xadd("agx:1:1:s", {"type": "begin", "origin": "opale", "body": "{}"})
        admin.set("agx:1:1:s:live", "run", px=60_000)
        admin.zadd("agx:1:1", {"s": 1})
    async for _ in as_user(rig, "agx-listener"):
        await reset_stats(rig)
        assert await agx.is_live(1, 1, "s")
        _leave_run(rig, "gap")
        assert await agx.is_live(1, 1, "gap")
        assert [found async for found in agx.q(1, 1)] == [(1, 1, "s")]
        hearing = asyncio.create_task(_hear("s"))
        resumed = [event async for event in agx.listen(1, 1, "s", after="1-0", timeout=0.1, serialize=False)]
        assert resumed[0]["body"]["gap"]
        await wait_until(lambda: commands_allowed("agx-listener") - {"unsubscribe"} <= commands_used(rig))
        with rig.admin() as admin:
            admin.xadd("agx:1:1:s", {"type": "end", "origin": "opale", "body": "{}"})
        assert await hearing == ["begin", "end"]
        assert await _hear("other", wait=0.01) == []  # its subscription replaces the first
        await wait_until(lambda: "unsubscribe" in commands_used(rig))
        with pytest.raises(agx.AgxError):
            await agx.cancel(1, 1, "s")
        with pytest.raises(agx.AgxError):
            await agx.add(1, 1, "s", type="info", origin="me")
    check_commands(rig, "agx-listener", refused={"evalsha", "xadd", "expire"})


def _leave_run(rig: TlsRig, session: str) -> None:
    """Write the begin of a run whose process died, and that another one can resume."""
    with rig.admin() as admin:
        body = '{"run_id": "r", "recover": 60}'
        admin.xadd(f"agx:1:1:{session}", {"type": "begin", "origin": "opale", "body": body})


async def _hear(session: str, wait: float = 30) -> list[str]:
    return [event["type"] async for event in agx.listen(1, 1, session, wait=wait, timeout=60, serialize=False)]


async def test_sidecar(rig: TlsRig, tmp_path: Path, otlp: OtlpReceiver) -> None:
    """Both sinks, a collector that is away, a run whose process has died, a standby that takes over."""
    async for _ in as_user(rig, "admin"):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps())
    async with running_service(tmp_path, rig.plain_url, "talking", session="doomed") as process:
        process.send(signal.SIGKILL)
    otlp.fail_with(503)
    await reset_stats(rig)
    environment = {
        "AGX_REDIS_CA": str(rig.ca),
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint_http,
    }
    first = Replica(tmp_path / "first", rig.url("agx-sidecar"), **environment)
    try:
        await _wait_for(first, completed=1, lost=1)
        await wait_until(lambda: "xpending" in commands_used(rig))
        otlp.recover()
        await wait_until(lambda: len({span.trace_id for span in otlp.spans}) == 2)
        second = Replica(tmp_path / "second", rig.url("agx-sidecar"), **environment)
        try:
            await wait_until(lambda: "pttl" in commands_used(rig), what="the second one stands by")
            assert first.end() == 0, first.log
            await _wait_for(second, completed=1, lost=1)
        finally:
            assert second.end() == 0, second.log
    finally:
        if first.alive:
            first.end()
    check_commands(rig, "agx-sidecar")


async def test_console(rig: TlsRig, tmp_path: Path) -> None:
    """A console of its own, with texts: both pages, a cancel of our run and of a seed client's, and a decision."""
    (more,) = re.findall(r"```acl\n(&.*?)```", PAGE.read_text(), re.DOTALL)
    rule = f"{published_rules()['agx-console']} {' '.join(more.replace('&', ' &').replace(chr(92), ' ').split())}"
    rig.set_users({"agx-console": rule})
    allowed = set(re.findall(r"\+([\w|]+)", rule))
    stage = ScriptedAgent(silent=True)
    async for _ in as_user(rig, "admin"):
        run = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", deps=ScopeDeps(session_id="ours")))
        await stage.reached.wait()
        with rig.admin() as admin:
            admin.set("agx:1:1:theirs:live", "1", px=60_000)
            leave_call(admin, keys.SessionKeys("agx", "1", "1", "waits"))
        await reset_stats(rig)
        console = Replica(
            tmp_path / "console", rig.url("agx-console"),
            AGX_REDIS_CA=str(rig.ca), AGX_SINKS="none", AGX_CONSOLE="full", AGX_CONSOLE_PORT="0",
            AGX_CONSOLE_CONTENT="1",
        )  # fmt: skip
        try:
            visitor = Visitor(await asyncio.to_thread(console_port, console))
            (run_id,) = (await asyncio.to_thread(visitor.get, "/")).rows()
            ours = {"scope": "1", "user": "1", "session": "ours", "run": run_id}
            page = await asyncio.to_thread(visitor.get, f"/run?{urlencode(ours)}")
            assert "Cancel this run" in page.text
            await _see_recovering(rig, visitor)
            decision = {"scope": "1", "user": "1", "session": "waits", "call": "c1", "decision": "approve"}
            assert (await asyncio.to_thread(visitor.post, "/decide", decision)).status == 303
            for form in (ours, {**ours, "session": "theirs", "run": "1"}):
                assert (await asyncio.to_thread(visitor.post, "/cancel", form)).status == 303
            with pytest.raises(agx.AgxCanceledError):
                await run
            with rig.admin() as admin:
                assert admin.get("agx:1:1:theirs:live") is None
            await wait_until(lambda: allowed <= commands_used(rig))
        finally:
            assert console.end() == 0, console.log
    with rig.admin() as admin:
        assert not [entry for entry in admin.acl_log() if entry["username"] == "agx-console"]


async def test_console_that_only_reads(rig: TlsRig, tmp_path: Path) -> None:
    """With what the page takes away for it: both pages, of a run that is live."""
    rule, selector = published_rules()["agx-console"], "(%R~agx:[^:]*:live +get)"
    assert f"`&agx:*:cancel` and `+publish`, and let the last selector be `{selector}`" in PAGE.read_text()
    rule = rule.replace("&agx:*:cancel ", "").replace("+publish ", "")
    rule = f"{rule[: rule.rindex('(')]}{selector}"
    rig.set_users({"agx-console": rule})
    allowed = set(re.findall(r"\+([\w|]+)", rule))
    stage = ScriptedAgent(silent=True)
    async for _ in as_user(rig, "admin"):
        run = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", deps=ScopeDeps()))
        await stage.reached.wait()
        await reset_stats(rig)
        console = Replica(
            tmp_path / "console", rig.url("agx-console"),
            AGX_REDIS_CA=str(rig.ca), AGX_SINKS="none", AGX_CONSOLE="read", AGX_CONSOLE_PORT="0",
        )  # fmt: skip
        try:
            visitor = Visitor(await asyncio.to_thread(console_port, console))
            (run_id,) = (await asyncio.to_thread(visitor.get, "/")).rows()
            place = urlencode({"scope": "1", "user": "1", "session": "s", "run": run_id})
            assert run_id in (await asyncio.to_thread(visitor.get, f"/run?{place}")).text
            await _see_recovering(rig, visitor)
            await wait_until(lambda: allowed <= commands_used(rig), what="all that is allowed is used")
        finally:
            assert await asyncio.to_thread(console.end) == 0, console.log
        assert await agx.cancel(1, 1, "s")
        with pytest.raises(agx.AgxCanceledError):
            await run
    with rig.admin() as admin:
        assert not [entry for entry in admin.acl_log() if entry["username"] == "agx-console"]


async def _see_recovering(rig: TlsRig, visitor: Visitor) -> None:
    _leave_run(rig, "gap")
    place = urlencode({"scope": "1", "user": "1", "session": "gap", "run": "r"})
    assert "recovering" in (await asyncio.to_thread(visitor.get, f"/run?{place}")).text


async def _wait_for(sidecar: Replica, **outcomes: int) -> None:
    def counted() -> bool:
        scraped = sidecar.scrape()
        return all(scraped.total("agx_runs_total", outcome=name) == count for name, count in outcomes.items())

    await wait_until(lambda: asyncio.to_thread(counted), what=f"{outcomes}: {sidecar.log}")


REFUSED = {
    "agx-service": [
        "XCLAIM agx::jobs:0 g c 0 1-1", "XPENDING agx::jobs:0 g", "ZADD agx::workers 1 x",
        "SET other:1:1:s x", "GET agx::leader", "SET agx::leader x", "GET agx::metrics", "XADD agx::other * a b",
        "PUBLISH other x", "SUBSCRIBE other", "SUBSCRIBE agx:1:1:s", "FLUSHALL", "KEYS *", "SCAN 0",
        "CONFIG GET *", "ACL LIST", "SCRIPT FLUSH", "CLIENT LIST",
        "XTRIM agx:1:1:s MAXLEN 0", "RENAME agx:1:1:s agx:1:1:t",
    ],
    "agx-worker": [
        "SET other:1:1:s x", "GET agx::leader", "GET agx::metrics", "XADD agx::other * a b", "ZADD agx::other 1 x",
        "PUBLISH other x", "SUBSCRIBE other", "FLUSHALL", "KEYS *", "CONFIG GET *", "XGROUP DESTROY agx::jobs:0 x",
    ],
    "agx-listener": [
        "XRANGE agx::jobs:0 - +", "ZSCORE agx::workers x",
        "XRANGE other:1:1:s - +", "XRANGE agx::queue:0 - +", "ZRANGE agx::leases:0 0 -1", "HGETALL agx::meta",
        "XADD agx:1:1:s * a b", "SET agx:1:1:s:live x", "DEL agx:1:1:s:live", "GETEX agx:1:1:s:live", "ZREM agx:1:1 s",
        "GET agx:1:1:s:msgs", "HMGET agx:1:1:s:msgs messages", "EVAL x 1 agx:1:1:s", "PUBLISH agx:1:1:s:wake x",
        "PUBLISH agx:1:1:s:cancel x", "SUBSCRIBE agx:1:1:s:cancel", "FLUSHALL", "KEYS *", "CONFIG GET *",
    ],
    "agx-sidecar": [
        "XRANGE other:1:1:s - +", "GET agx:1:1:s:msgs", "HMGET agx:1:1:s:msgs messages", "HSET agx::meta a b",
        "SET agx:1:1:s x", "DEL agx:1:1:s", "PUBLISH agx:1:1:s:cancel x",
        "SUBSCRIBE agx:1:1:s:wake", "ZADD agx::leases:0 1 x",
        "XADD agx::jobs:0 * a b", "XACK agx::jobs:0 g 1-1",
        "FLUSHALL", "KEYS *", "CONFIG SET maxmemory 1", "ACL LIST",
    ],
    "agx-console": [
        "XRANGE other:1:1:s - +", "GET agx:1:1:s:msgs", "XADD agx:1:1:s * a b", "DEL agx:1:1:s", "EVAL x 1 agx:1:1:s",
        "XADD agx::queue:0 * a b", "ZREM agx::leases:0 x", "HSET agx::meta a b", "GET agx::metrics",
        "SET agx::leader x", "PUBLISH agx:1:1:s:wake x", "SUBSCRIBE agx:1:1:s:cancel", "FLUSHALL", "KEYS *", "ACL LIST",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("user", "command"), [(user, command) for user, these in REFUSED.items() for command in these])
def test_what_is_refused(rig: TlsRig, user: str, command: str) -> None:
    with rig.admin() as admin:
        verdict = admin.execute_command("ACL", "DRYRUN", user, *command.split())
    assert verdict != b"OK"
    assert b"no permissions" in verdict or b"NOPERM" in verdict, verdict


@pytest.mark.parametrize(
    ("user", "roles"),
    [
        ("agx-service", ["service", "listener"]),
        ("agx-worker", ["service", "worker", "listener"]),
        ("agx-listener", ["listener"]),
        ("agx-sidecar", ["sidecar"]),
    ],
)
async def test_doctor_names_what_each_user_suffices_for(rig: TlsRig, user: str, roles: list[str]) -> None:
    async with tls_topology(rig, user).open() as client:
        assert (await find_rights(client, "agx")).suffices_for == roles
    with rig.admin() as admin:  # redis-py does not wait until a subscribed connection is closed
        await wait_until(lambda: all(other["user"] != user for other in admin.client_list()))


ADDED_IN_A_CLUSTER = {
    "agx-service": "+cluster|slots",
    "agx-worker": "+cluster|slots",
    "agx-listener": "+cluster|slots",
    "agx-sidecar": "+cluster|slots +command +command|getkeys",
    "agx-console": "+cluster|slots +command +command|getkeys",
}


async def test_in_a_cluster(cluster: ClusterRig, tmp_path: Path) -> None:
    """With what the page adds for a cluster; Valkey takes the same rules."""
    for added in ADDED_IN_A_CLUSTER.values():
        assert all(part in PAGE.read_text() for part in added.split())
    for server in cluster.servers:
        with SyncRedis(port=server.port) as admin:
            for user, rule in published_rules().items():
                added = f"{rule} {ADDED_IN_A_CLUSTER[user]}"
                admin.execute_command("ACL", "SETUSER", user, "reset", "on", f">{user}", *_rule_parts(added))
    cluster.flush()

    async def as_cluster_user(user: str) -> None:
        client = RedisCluster(host="127.0.0.1", port=cluster.servers[0].port, username=user, password=user)
        agx.configure(agx.Config(redis=client))

    await as_cluster_user("agx-service")
    for name in ("a", "b"):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", deps=ScopeDeps(session_id=name))
    for name in ("c", "d"):
        await agx.submit(1, 1, name, agent="support", prompt="Hi")
    await agx.aclose()
    await as_cluster_user("agx-worker")
    async with _working(ScriptedAgent()):
        for name in ("c", "d"):
            await _hear(name)
    await agx.aclose()
    await as_cluster_user("agx-listener")
    for name in ("a", "b", "c", "d"):
        assert (await _hear(name))[-1] == "end"
    await agx.aclose()
    url = cluster.url.replace("redis+cluster://", "redis+cluster://agx-sidecar:agx-sidecar@")
    sidecar = Replica(tmp_path / "sidecar", url)
    try:
        await _wait_for(sidecar, completed=4)
    finally:
        assert sidecar.end() == 0, sidecar.log
    assert "permission" not in sidecar.log


def _rule_parts(rule: str) -> list[str]:
    """Return a rule's parts; a selector in brackets is one."""
    return re.findall(r"\([^)]*\)|\S+", rule)
