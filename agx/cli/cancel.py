"""`agx cancel`: stop a session's live run."""

from __future__ import annotations

import argparse
import asyncio

from ..engine.cancellation import cancel
from .options import (
    Commands,
    add_command,
    add_place,
    add_session,
    find_session,
    open_place,
)
from .terminal import print_json


def add_to(commands: Commands) -> None:
    """Say what it takes."""
    parser = add_command(
        commands,
        "cancel",
        help="stop a live run",
        description="Tells a live run to stop, wherever it runs. Exit code 3: there was none.",
        examples=("agx cancel acme/ada/chat-1", "agx cancel chat-1  # where only one live session is called so"),
    )
    add_session(parser)
    add_place(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_cancel(args)))


async def _cancel(args: argparse.Namespace) -> int:
    async with open_place(args) as place:
        session = await find_session(place, args.session)
        found = await cancel(session.scope, session.user, session.session)
    name = f"{session.scope}/{session.user}/{session.session}"
    if args.json:
        print_json({"session": name, "cancelled": found})
    else:
        print(f"{name}: told to stop" if found else f"{name}: nothing is live")
    return 0 if found else 3
