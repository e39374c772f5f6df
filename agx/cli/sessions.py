"""`agx cancel`, `agx pending`, `agx decide`: what people ask of a session."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import time
from dataclasses import asdict

import orjson

from ..control.cancellation import cancel
from ..errors import AgxError
from ..redis.bus import Bus
from ..redis.keys import SessionKeys
from ..stream.entry import StreamEntry
from .options import (
    Commands,
    add_command,
    add_connection_options,
    add_session,
    connect,
    find_session,
)
from .terminal import print_json, print_table

_END_WAIT = 3.0  # seconds in which a cancelled run usually ends
_POLL = 0.1  # seconds


def add_to(commands: Commands) -> None:
    """Add the commands and their options."""
    parser = add_command(
        commands,
        "cancel",
        help="stop a live run",
        description="Cancels a live run, in whichever process it runs, and waits a moment for its end. "
        "Exit code 3: nothing was live, or the run ended before the cancel reached it.",
        examples=("agx cancel acme/ada/chat-1", "agx cancel chat-1  # where only one session has this name"),
    )
    add_session(parser)
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_cancel(args)))
    parser = add_command(
        commands,
        "pending",
        help="list the tool calls that wait",
        description="Lists the tool calls of a scope that wait for a decision, or for a result from elsewhere.",
        examples=("agx pending acme", "agx pending acme --user ada --json"),
    )
    parser.add_argument("scope", metavar="SCOPE")
    parser.add_argument("--user", help="only this user's")
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_list_pending(args)))
    parser = add_command(
        commands,
        "decide",
        help="approve or deny a tool call that waits",
        description="Decides on a tool call; with the last decision of its run, a worker goes on.",
        examples=(
            "agx decide acme/ada/chat-1 call-1 --approve",
            "agx decide acme/ada/chat-1 call-2 --result 21  # made elsewhere",
        ),
    )
    parser.add_argument("session", metavar="SESSION", help="SCOPE/USER/SESSION")
    parser.add_argument("call", metavar="CALL", help="the call's id, as `agx pending` shows it")
    decision = parser.add_mutually_exclusive_group(required=True)
    decision.add_argument("--approve", action="store_true", help="the call is made")
    decision.add_argument("--deny", action="store_true", help="the model gets that it was denied")
    decision.add_argument("--result", metavar="JSON", help="the call's result")
    parser.add_argument("--by", default=getpass.getuser(), help="who decides, for the log (default: you)")
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_decide(args)))


async def _cancel(args: argparse.Namespace) -> int:
    async with connect(args) as connection:
        session = await find_session(connection, args.session)
        found = await cancel(session.scope, session.user, session.session)
        outcome = await _read_outcome(connection.bus, session, wait=_END_WAIT if found else 0.0)
    cancelled = found and outcome in ("cancelled", "stopped", None)
    if args.json:
        print_json({"session": session.path, "cancelled": cancelled, "outcome": outcome})
    elif cancelled:
        print(f"{session.path}: {outcome or 'cancel requested, it has not ended yet'}")
    else:
        print(f"{session.path}: {f'too late, its run has ended: {outcome}' if outcome else 'nothing is live'}")
    return 0 if cancelled else 3


async def _read_outcome(bus: Bus, session: SessionKeys, *, wait: float) -> str | None:
    """Return how the session's latest run ended; None where it has no `end` after `wait` seconds, or has expired."""
    deadline = time.monotonic() + wait
    while True:
        entries = await bus.execute("XREVRANGE", session.stream, "+", "-", "COUNT", 1)
        last = StreamEntry.of(*entries[0]) if entries else None
        if last is not None and last.type == "end":
            return str(last.body.get("outcome") or "stopped")  # a session without an agent has no outcome
        if time.monotonic() >= deadline:
            return None
        await asyncio.sleep(_POLL)


# `jobs.decide` imports pydantic-ai, which takes a second: only where it is used.


async def _list_pending(args: argparse.Namespace) -> int:
    from ..jobs.decide import pending  # noqa: PLC0415

    async with connect(args):
        calls = await pending(args.scope, args.user)
    if args.json:
        print_json([{**asdict(call), "session": "/".join(call.session)} for call in calls])
    elif calls:
        rows = [
            ("/".join(call.session), call.call_id, call.tool, call.kind, orjson.dumps(call.args).decode())
            for call in calls
        ]
        print_table(("SESSION", "CALL", "TOOL", "WAITS FOR", "ARGUMENTS"), rows)
    else:
        print("nothing waits")
    return 0


async def _decide(args: argparse.Namespace) -> int:
    from ..jobs.decide import decide  # noqa: PLC0415

    try:
        result = None if args.result is None else orjson.loads(args.result)
    except orjson.JSONDecodeError as error:
        raise AgxError(f"--result must be JSON ({error}): quote a text twice, as in --result '\"warm\"'") from None
    async with connect(args) as connection:
        session = await find_session(connection, args.session)
        ids = (session.scope, session.user, session.session)
        run_id = await decide(*ids, call_id=args.call, approve=not args.deny, result=result, by=args.by)
    if args.json:
        print_json({"session": session.path, "call_id": args.call, "run_id": run_id})
    else:
        print(f"{session.path}: " + ("stored; other calls wait" if run_id is None else f"run {run_id} goes on"))
    return 0
