"""`agx ls`: the live runs."""

from __future__ import annotations

import argparse
import asyncio

from ..fleet.fleet import (
    LiveRun,
    find_live,
    read_clock,
    read_last,
)
from ..stream.entry import StreamEntry
from .options import (
    Commands,
    add_command,
    add_connection_options,
    connect,
)
from .terminal import format_duration, print_json, print_table


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "ls",
        help="list the live runs",
        description="Lists live runs, longest first.",
        examples=("agx ls --scope acme", "agx ls --json | jq -r '.[] | select(.state == \"dead\") | .run_id'"),
    )
    parser.add_argument("--scope", help="only this scope's")
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_list(args)))


async def _list(args: argparse.Namespace) -> int:
    async with connect(args) as connection:
        now_ms = await read_clock(connection.bus)
        live = await find_live(connection.bus, connection.prefix, await connection.partitions())
        runs = [run for run in live if args.scope in (None, run.session.scope)]
        last = await read_last(connection.bus, runs)
    if args.json:
        print_json([_described(run, entry, now_ms) for run, entry in zip(runs, last, strict=True)])
        return 0
    heads = ("SESSION", "AGENT", "RUNNING", "SILENT", "STATE", "RUN")
    rows = [_row(run, entry, now_ms) for run, entry in zip(runs, last, strict=True)]
    if rows:
        print_table(heads, rows, right=("RUNNING", "SILENT"), least=("RUN", "SILENT"))
    else:
        print("nothing is live")
    return 0


def _described(run: LiveRun, last: StreamEntry | None, now_ms: int) -> dict[str, object]:
    session = run.session
    return {
        "scope": session.scope,
        "user": session.user,
        "session": session.session,
        "run_id": run.run_id,
        "agent": run.agent,
        "manual": run.manual,
        "state": _state(run, last, now_ms),
        "began_ms": run.began_ms,
        "last_event_ms": last.id[0] if last is not None else None,
    }


def _row(run: LiveRun, last: StreamEntry | None, now_ms: int) -> tuple[str, ...]:
    return (
        run.session.path,
        run.agent or "-",
        format_duration(now_ms - run.began_ms) if run.began_ms else "-",
        format_duration(now_ms - last.id[0]) if last is not None else "-",
        _state(run, last, now_ms),
        run.run_id,
    )


def _state(run: LiveRun, last: StreamEntry | None, now_ms: int) -> str:
    if run.is_recovering(last, now_ms):
        return "recovering"
    if run.is_dead(now_ms):
        return "dead"
    return {"held": "live", "cancelling": "cancelling", "gone": "ending"}[run.lease]
