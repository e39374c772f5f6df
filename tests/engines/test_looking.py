"""The console and the command line on each engine: runs of every node are seen, followed and cancelled."""

from __future__ import annotations

import asyncio
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from support.agents import FakeSession, ScopeDeps, ScriptedAgent
from support.replica import Replica
from support.topologies import Topology
from support.visitor import Visitor, console_port

import agx

AGX = Path(sysconfig.get_path("scripts")) / "agx"


async def ask(topology: Topology, *args: str) -> tuple[int | None, Any]:
    """Run `agx` with --json; returns its exit code and its answer."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AGX_")}
    given = {"AGX_REDIS_URL" if name == "redis_url" else name: value for name, value in topology.environment.items()}
    process = await asyncio.create_subprocess_exec(
        AGX, *args, "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**inherited, **given}
    )
    out, err = await asyncio.wait_for(process.communicate(), 90)
    assert out, err.decode()
    return process.returncode, json.loads(out)


async def test_live_runs_are_seen_and_cancelled(topology: Topology, tmp_path: Path) -> None:
    stages = {f"s{n}": ScriptedAgent(hold_after=1) for n in range(6)}  # on every node of a cluster
    runs = {
        name: asyncio.create_task(agx.run(FakeSession(), stage.agent(), "Hi", ScopeDeps(scope=name, session_id=name)))
        for name, stage in stages.items()
    }
    for stage in stages.values():
        await stage.reached.wait()
    console = Replica(
        tmp_path / "console", **topology.environment, AGX_CONSOLE="full", AGX_CONSOLE_PORT="0", AGX_SINKS="none"
    )
    try:
        visitor = Visitor(await asyncio.to_thread(console_port, console))
        _, listed = await ask(topology, "ls")
        seen = await asyncio.to_thread(visitor.get, "/")
        assert {run["session"] for run in listed} == set(stages)
        assert set(seen.rows()) == {run["run_id"] for run in listed}
        first, second, *others = listed
        form = {"scope": first["scope"], "user": "1", "session": first["session"], "run": first["run_id"]}
        assert (await asyncio.to_thread(visitor.post, "/cancel", form)).status == 303
        code, said = await ask(topology, "cancel", second["run_id"])
        assert (code, said) == (
            0,
            {"session": f"{second['scope']}/1/{second['session']}", "cancelled": True, "outcome": "cancelled"},
        )
        for run in others:
            assert await agx.cancel(run["scope"], 1, run["session"])
        for task in runs.values():
            with pytest.raises(agx.AgxCanceledError):
                await asyncio.wait_for(task, 30)
        page = await asyncio.to_thread(visitor.get, f"/run?scope={first['scope']}&run={first['run_id']}")
        assert "cancelled" in page.text
        (_, stats), (code, findings) = await asyncio.gather(ask(topology, "stats"), ask(topology, "doctor"))
        assert stats["agents"]["staged"]["cancelled"] == len(stages)
        assert {finding["check"] for finding in findings if finding["state"] == "fault"} == set()
        assert code == 0
    finally:
        assert console.end() == 0, console.log
