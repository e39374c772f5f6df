"""The command line as people and scripts use it: real processes on a real server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sysconfig
import termios
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.waiting import wait_until

import agx
from agx import cli
from agx.cli import terminal
from agx.redis import keys
from agx.testing import collect

AGX = Path(sysconfig.get_path("scripts")) / "agx"
Done = tuple[int, str, str]


@asynccontextmanager
async def started(redis_url: str, *args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running `agx`."""
    process = await asyncio.create_subprocess_exec(
        AGX, *args, "--redis", redis_url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def call(redis_url: str, *args: str) -> Done:
    """Run `agx` to its end; returns its exit code and what it said."""
    async with started(redis_url, *args) as process:
        out, err = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode()


async def ask(redis_url: str, *args: str) -> tuple[int, Any]:
    code, out, err = await call(redis_url, *args, "--json")
    assert out, err
    return code, json.loads(out)


@asynccontextmanager
async def live_run(session: str, **scope: keys.Id) -> AsyncIterator[asyncio.Task[Any]]:
    """A run that has said one word and waits."""
    stage = ScriptedAgent(hold_after=1)
    run = asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", ScopeDeps(session_id=session, **scope)))
    await stage.reached.wait()
    yield run
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


async def test_a_live_run_is_listed_followed_and_cancelled(configured: Redis, redis_url: str) -> None:
    async with live_run("chat-1") as run, live_run("chat-2", scope="acme"):
        (_, listed), (_, acme), (code, table, _) = await asyncio.gather(
            ask(redis_url, "ls"), ask(redis_url, "ls", "--scope", "acme"), call(redis_url, "ls")
        )
        assert [(entry["scope"], entry["session"], entry["state"]) for entry in listed] == [
            ("1", "chat-1", "live"),
            ("acme", "chat-2", "live"),
        ]
        assert [entry["session"] for entry in acme] == ["chat-2"]
        assert code == 0
        assert "1/1/chat-1     staged" in table
        assert listed[0]["run_id"] in table
        async with started(redis_url, "tail", listed[0]["run_id"], "--json") as tail:
            assert tail.stdout is not None
            first = json.loads(await asyncio.wait_for(tail.stdout.readline(), 90))
            assert (first["type"], first["body"]["run_id"]) == ("begin", listed[0]["run_id"])
            code, said = await ask(redis_url, "cancel", "chat-1")
            assert (code, said) == (0, {"session": "1/1/chat-1", "cancelled": True, "outcome": "cancelled"})
            with pytest.raises(agx.AgxCanceledError):
                await run
            rest = [json.loads(line) for line in (await tail.stdout.read()).splitlines()]
            assert rest[-1]["body"]["outcome"] == "cancelled"
            assert await asyncio.wait_for(tail.wait(), 90) == 3
        (code, said), (late, out, _), (again, shown, _), (unknown, _, err) = await asyncio.gather(
            ask(redis_url, "cancel", "1/1/chat-1"),
            call(redis_url, "cancel", "chat-1"),
            call(redis_url, "tail", "chat-1"),
            call(redis_url, "cancel", "chat-3"),
        )
        assert (code, said) == (3, {"session": "1/1/chat-1", "cancelled": False, "outcome": "cancelled"})
        assert (late, out) == (3, "1/1/chat-1: too late, its run has ended: cancelled\n")
        assert (again, "● cancelled in" in shown, "canceled" in shown) == (3, True, False)
        assert unknown == 1
        assert "name it as SCOPE/USER/SESSION" in err


async def test_tail_shows_a_run_to_people_and_lets_nobody_steer_the_terminal(configured: Redis, redis_url: str) -> None:
    stage = ScriptedAgent(words=("Hello ", "\x1b[2Jworld", "\u202e!"), call_tool=True)
    await agx.run(FakeSession(), stage.agent(), "Hi", ScopeDeps(session_id="chat-1"))
    code, out, _ = await call(redis_url, "tail", "1/1/chat-1")
    assert code == 0
    assert "● staged  run" in out
    assert '⚙ work("n":1)' in out
    assert "↳ ok  work: worked 1" in out
    assert "Hello \N{REPLACEMENT CHARACTER}[2Jworld\N{REPLACEMENT CHARACTER}!" in out
    assert "● completed in" in out
    assert "\x1b" not in out


async def test_tail_and_cancel_find_a_session_that_has_ended_by_its_short_name(
    configured: Redis, redis_url: str
) -> None:
    for session, scope in (("done", "acme"), ("twice", "acme"), ("twice", "globex")):
        await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps(session_id=session, scope=scope))
    tail, cancel, twice = await asyncio.gather(
        call(redis_url, "tail", "done"), call(redis_url, "cancel", "done"), call(redis_url, "tail", "twice")
    )
    assert (tail[0], "● completed in" in tail[1]) == (0, True)
    assert cancel == (3, "acme/1/done: too late, its run has ended: completed\n", "")
    assert twice == (1, "", "agx tail: 2 sessions are called 'twice': acme/1/twice, globex/1/twice\n")


async def test_tail_shows_prompts_as_text(configured: Redis, redis_url: str) -> None:
    for kind, origin, body in (
        ("begin", "opale", {"run_id": "r"}),
        ("info", "prompt", {"prompt": "Where is\nmy order?", "after": 0}),
        ("info", "prompt", {"prompt": None, "after": 2}),
        ("end", "opale", {"run_id": "r", "outcome": "completed"}),
    ):
        await configured.xadd("agx:1:1:asked", {"type": kind, "origin": origin, "body": json.dumps(body)})
    await configured.expire("agx:1:1:asked", 60)
    _, out, _ = await call(redis_url, "tail", "1/1/asked")
    assert out.splitlines()[1:4] == ["> Where is", "my order?", "> goes on with the decided calls"]


def test_options_stand_before_or_behind_the_command_and_errors_are_json_too(
    redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (
        ["ls", "--redis", redis_url, "--prefix", "p", "--json"],
        ["--redis", redis_url, "--json", "--prefix", "p", "ls"],
    ):
        assert cli.main(argv) == 1
        out, err = capsys.readouterr()
        assert (out, json.loads(err)["error"]) == ("", "AgxError")
        assert json.loads(err)["message"].startswith("no service has run on prefix 'p'")
    for argv, message in (
        (["ls", "--json", "--bogus"], "agx: unrecognized arguments: --bogus"),
        (["--json", "demo"], "agx: demo takes none of --redis, --prefix and --json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(argv)
        assert json.loads(capsys.readouterr().err) == {"error": "UsageError", "message": message}


async def test_tail_shows_what_nests_deeper_than_json_is_written(configured: Redis, redis_url: str) -> None:
    deep = '{"event":"part_start","part_kind":"tool-return","tool_name":"look","content":' + "[" * 500 + "]" * 500 + "}"
    for kind, body in (("begin", '{"run_id":"r"}'), ("event", deep), ("end", '{"run_id":"r","outcome":"completed"}')):
        await configured.xadd("agx:1:1:deep", {"type": kind, "origin": "custom", "body": body})
    await configured.expire("agx:1:1:deep", 60)
    code, out, _ = await call(redis_url, "tail", "1/1/deep")
    assert (code, "look: nested too deeply to be shown" in out) == (0, True)


async def test_tail_goes_on_behind_an_event_and_says_when_there_is_nothing(configured: Redis, redis_url: str) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps(session_id="chat-1"))
    events = await collect(1, 1, "chat-1")
    (code, out, _), nothing, no_cursor = await asyncio.gather(
        call(redis_url, "tail", "1/1/chat-1", "--json", "--after", events[-2]["id"]),
        call(redis_url, "tail", "1/1/other"),
        call(redis_url, "tail", "1/1/chat-1", "--after", "yesterday"),
    )
    assert (code, [json.loads(line)["type"] for line in out.splitlines()]) == (0, ["end"])
    assert nothing[0] == 1
    assert "1/1/other has no events" in nothing[2]
    assert no_cursor[0] == 1
    assert "must be the id of an event" in no_cursor[2]


def in_terminal(columns: int, *args: str, **environment: str) -> list[str]:
    """Run `agx` to its end in a terminal that is so wide; returns the lines it showed."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment = {**inherited, "TERM": "xterm-256color", **environment}
    shown = b""
    with subprocess.Popen([AGX, *args], stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # how the end looks from this side
            while piece := os.read(terminal, 65_536):
                shown += piece
        os.close(terminal)
    assert process.returncode == 0, shown
    return shown.decode().splitlines()


async def test_a_terminal_gets_whole_names_and_numbers(configured: Redis, redis_url: str) -> None:
    session = "a-session-whose-name-is-as-long-as-they-are"
    await agx.run(FakeSession(), ScriptedAgent(call_tool=True).agent(), "Hi", ScopeDeps(session_id="s"))
    async with live_run(session, scope="acme"):
        narrow, wide, stats, doctor, plain = await asyncio.gather(
            *(
                asyncio.to_thread(in_terminal, columns, command, "--redis", redis_url, **environment)
                for columns, command, environment in (
                    (80, "ls", {}),
                    (140, "ls", {}),
                    (80, "stats", {}),
                    (80, "doctor", {}),
                    (80, "doctor", {"NO_COLOR": "1"}),
                )
            )
        )
    assert f"acme/1/{session}" in narrow[1]
    assert "live" in narrow[1]
    assert "RUN" not in narrow[0].replace("RUNNING", "")
    assert re.search(r"[0-9a-f]{32}", wide[1])
    assert not [line for line in (*narrow, *wide, *stats) if "…" in line]
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in (*narrow, *stats)) <= 80
    assert "COMPLETED" in stats[1]
    assert any("\x1b[32m" in line for line in doctor)
    assert not any("\x1b" in line for line in plain)


async def test_ctrl_c_is_quiet_while_the_command_is_still_loading(configured: Redis, redis_url: str) -> None:
    async with started(redis_url, "tail", "1/1/nothing") as tail:
        await wait_until(lambda: "hiredis" in Path(f"/proc/{tail.pid}/maps").read_text(), what="half loaded")
        tail.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(tail.communicate(), 90)
        assert (tail.returncode, out, err) == (130, b"", b"")


async def test_ctrl_c_is_clean(configured: Redis, redis_url: str) -> None:
    async with live_run("chat-1"), started(redis_url, "tail", "chat-1", "--json") as tail:
        assert tail.stdout is not None
        await asyncio.wait_for(tail.stdout.readline(), 90)
        tail.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(tail.communicate(), 90)
        assert (tail.returncode, err) == (130, b"")


async def test_stats_agree_with_what_ran(configured: Redis, redis_url: str) -> None:
    for n in range(3):
        await agx.run(FakeSession(), ScriptedAgent(call_tool=True).agent(), "Hi", ScopeDeps(session_id=f"s{n}"))
    with pytest.raises(ZeroDivisionError):
        await agx.run(FakeSession(), ScriptedAgent(model_error=ZeroDivisionError()).agent(), "Hi", ScopeDeps())
    async with live_run("live"):
        (_, figures), (_, shown, _) = await asyncio.gather(ask(redis_url, "stats"), call(redis_url, "stats"))
    staged = figures["agents"]["staged"]
    assert (staged["completed"], staged["failed"], staged["tool_calls"]) == (3, 1, 3)
    assert staged["model_calls"] == 7
    assert staged["p95_s"] >= staged["p50_s"] > 0
    assert (figures["live"], figures["dead"], figures["live_by_scope"]) == (1, 0, {"1": 1})
    assert sum(figures["queue_lengths"]) == figures["facts_read"]
    assert "1 live" in shown
    assert "staged     4" in shown


def by_check(findings: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in findings}


async def test_a_healthy_fleet(configured: Redis, redis_url: str) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps())
    await agx.aclose()  # emits its last heartbeat
    await configured.set(keys.leader("agx"), "somebody", ex=60)
    before = {key: await configured.dump(key) for key in await configured.keys()}
    (code, findings), (_, shown, _) = await asyncio.gather(ask(redis_url, "doctor"), call(redis_url, "doctor"))
    assert (code, {finding["state"] for finding in findings}) == (0, {"ok"})
    assert by_check(findings)["rights"]["said"] == "this user will do for a service, a worker, a listener, a sidecar"
    assert shown.count("✔") == len(findings) == 9
    assert {key: await configured.dump(key) for key in await configured.keys()} == before  # it changes nothing


async def test_a_run_without_a_process_is_recovering_while_another_can_resume_it(
    configured: Redis, redis_url: str
) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps())  # writes the number of partitions
    past_ms = int(time.time() * 1_000) - 60_000
    for name, recover in (("resumable", 3_600), ("lost", 10)):
        session = keys.SessionKeys("agx", "1", "1", name)
        begin = {"run_id": f"run-{name}", "agent": "support", "recover": recover}
        await configured.xadd(session.stream, {"type": "begin", "body": json.dumps(begin)}, id=f"{past_ms}-0")
        await configured.expire(session.stream, 60)
        await configured.zadd(keys.leases("agx", 0), {session.lease_member(f"run-{name}"): past_ms})
    await configured.expire(keys.leases("agx", 0), 60)
    (_, listed), (_, figures), (_, shown, _), (_, findings) = await asyncio.gather(
        ask(redis_url, "ls"), ask(redis_url, "stats"), call(redis_url, "stats"), ask(redis_url, "doctor")
    )
    assert {run["session"]: run["state"] for run in listed} == {"resumable": "recovering", "lost": "dead"}
    assert (figures["live"], figures["recovering"], figures["dead"]) == (2, 1, 1)
    assert "2 live, 1 of them recovering, 1 of them dead;" in shown
    assert by_check(findings)["leases"]["said"].startswith("1 of 2 have no process any more")
    await configured.zrem(keys.leases("agx", 0), "1:1:lost:run-lost")
    _, findings = await ask(redis_url, "doctor")
    assert by_check(findings)["leases"]["said"] == "0 live, 1 recovering"


async def test_what_is_wrong_is_found_with_what_to_do(configured: Redis, redis_url: str) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps())
    queue = keys.queue("agx", keys.partition("1", 8))
    session = keys.SessionKeys("agx", "1", "1", "gone")
    await configured.zadd(keys.leases("agx", 0), {session.lease_member("run-9"): int(time.time() * 1_000) - 60_000})
    await configured.expire(keys.leases("agx", 0), 60)
    await configured.xgroup_create(queue, "forgotten", "0")
    await configured.xadd(keys.queue("agx", 11), {"fact": "{}"})
    await configured.expire(keys.queue("agx", 11), 60)
    await agx.submit("acme", "ada", "s", agent="suport", prompt="Hi")
    await agx.submit("acme", "ada", "t", agent="nightly", prompt="Hi", delay=3_600)
    await configured.config_set("maxmemory-policy", "allkeys-lru")
    try:
        code, findings = await ask(redis_url, "doctor")
    finally:
        await configured.config_set("maxmemory-policy", "noeviction")
    found = by_check(findings)
    assert code == 3
    assert {check: finding["state"] for check, finding in found.items() if finding["state"] != "ok"} == {
        "memory": "fault",
        "partitions": "warning",
        "leases": "fault",
        "leader": "warning",
        "queues": "fault",
        "jobs": "fault",
    }
    assert all(finding["to_do"] for finding in findings if finding["state"] != "ok")
    assert "allkeys-lru" in found["memory"]["said"]
    assert "1/1/gone" in found["leases"]["said"]
    assert f"XGROUP DESTROY {queue} forgotten" in found["queues"]["to_do"]
    assert "agx::queue:11" in found["partitions"]["said"]
    assert found["jobs"]["said"] == "jobs wait for suport, and no worker serves that name"


async def test_rights_are_tried_without_changing_anything(configured: Redis, redis_url: str) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps())
    reads = "+exists +get +xrange +xrevrange +zrange +zscore"
    listener = f"-@all +ping +subscribe +unsubscribe +client|setinfo {reads} %R~agx:[^:]* resetchannels &agx:*:wake"
    await configured.execute_command("ACL", "SETUSER", "reader", "reset", "on", ">pw", *listener.split())
    await configured.execute_command("ACL", "SETUSER", "nobody", "reset", "on", ">pw", "-@all", "+ping")
    try:
        (_, some), (code, none) = await asyncio.gather(
            *(ask(redis_url.replace("://", f"://{user}:pw@"), "doctor") for user in ("reader", "nobody"))
        )
    finally:
        await configured.execute_command("ACL", "DELUSER", "reader", "nobody")
    rights = by_check(some)["rights"]
    assert rights["state"] == "ok"
    assert rights["said"].startswith("this user will do for a listener; as a service it lacks GETEX live, SET live")
    assert "SUBSCRIBE cancel" in rights["said"]
    assert by_check(none)["rights"]["state"] == "fault"
    assert code == 3
    assert by_check(none)["memory"]["said"].startswith("not looked at")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("ls", "--redis", "redis://:secret@127.0.0.1:1"), "Redis could not be reached"),
        (("doctor", "--redis", "redis://:secret@127.0.0.1:1"), "Redis could not be reached"),
        (("ls", "--redis", "http://:secret@x"), "AGX_REDIS_URL can't be used"),
        (("ls", "--prefix", "a b"), "AGX_KEY_PREFIX can't be used"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"agx {args[0]}: {said}")
    assert err.count("\n") == 1
    assert "secret" not in err


async def test_a_wrong_password_is_no_outage(configured: Redis, redis_url: str) -> None:
    code, _, err = await call(redis_url.replace("://", "://somebody:secret@"), "ls")
    assert code == 1
    assert "asks for a password, or refuses the one it got" in err
    assert "AGX_REDIS_PASSWORD" in err
    assert err.count("\n") == 1
    assert "secret" not in err


async def test_an_empty_list_says_so(configured: Redis, redis_url: str) -> None:
    await agx.run(FakeSession(), ScriptedAgent().agent(), "Hi", ScopeDeps())
    assert await call(redis_url, "ls") == (0, "nothing is live\n", "")
    assert await ask(redis_url, "ls") == (0, [])


@pytest.mark.parametrize("command", ["demo", "ls", "tail", "cancel", "pending", "decide", "stats", "doctor"])
def test_help_has_examples_that_are_right(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    examples = re.findall(r"^  (.*agx .*)$", said.partition("examples:\n")[2], re.MULTILINE)
    assert examples
    assert max(map(len, said.splitlines())) <= 80
    for example in examples:
        words = shlex.split(re.split(r"[|>]", example)[0], comments=True)
        args = cli.build_parser().parse_args(words[words.index("agx") + 1 :])
        assert isinstance(args, argparse.Namespace)
        assert args.command == command


def test_a_prefix_that_nobody_uses_is_said(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "--redis", redis_url, "--prefix", "other"]) == 1
    assert "no service has run on prefix 'other'" in capsys.readouterr().err
    assert cli.main(["tail", "a/b c/d", "--redis", redis_url]) == 1
    assert "names no session" in capsys.readouterr().err


def test_without_rich_scripts_and_the_doctor_still_work(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    assert cli.main(["doctor", "--redis", redis_url]) == 0
    assert "warning  partitions" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AGX_REDIS_URL", redis_url)
        assert cli.main(["cancel", "1/1/s", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["cancelled"] is False
    assert cli.main(["tail", "1/1/s", "--redis", redis_url]) == 1
    assert "pip install 'opale-agent-stream[cli]'" in capsys.readouterr().err


async def test_a_reader_that_goes_away_ends_it_quietly(configured: Redis, redis_url: str) -> None:
    async with live_run("chat-1"):
        shell = await asyncio.create_subprocess_shell(
            f"{AGX} tail chat-1 --json --redis {redis_url} | head -1",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert shell.stdout is not None
        await asyncio.wait_for(shell.stdout.readline(), 90)

        async def speak() -> bool:
            await agx.add(1, 1, "chat-1", type="info", origin="me", body={"n": 1})
            return shell.stdout is not None and shell.stdout.at_eof()

        await wait_until(speak, 90)
        _, err = await shell.communicate()
        assert err == b""
