"""`agx cancel`: stop a session's live run."""

from __future__ import annotations

import argparse
import asyncio

from ..control.cancellation import cancel
from .options import (
    Commands,
    add_command,
    add_connection_options,
    add_session,
    connect,
    find_session,
)
from .terminal import print_json


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "cancel",
        help="stop a live run",
        description="Cancels a live run, in whichever process it runs. Exit code 3: there was none.",
        examples=("agx cancel acme/ada/chat-1", "agx cancel chat-1  # where only one live session has this name"),
    )
    add_session(parser)
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_cancel(args)))


async def _cancel(args: argparse.Namespace) -> int:
    async with connect(args) as connection:
        session = await find_session(connection, args.session)
        found = await cancel(session.scope, session.user, session.session)
    if args.json:
        print_json({"session": session.path, "cancelled": found})
    else:
        print(f"{session.path}: cancel requested" if found else f"{session.path}: nothing is live")
    return 0 if found else 3
