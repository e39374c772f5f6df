"""Shared by the commands that read Redis: their options, the connection, and how a session is named."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from textwrap import wrap
from typing import TypeAlias

from redis.exceptions import AuthenticationError, RedisError

from ..config import Config, configure
from ..engine.registry import aclose, current_engine
from ..errors import AgxError, RedisUnavailableError
from ..fleet.fleet import find_live, read_partitions
from ..redis.address import (
    Client,
    open_redis,
    read_address,
    read_prefix,
)
from ..redis.bus import Bus
from ..redis.keys import SessionKeys

_WIDTH = 78  # of a description, as argparse has it in a terminal of 80

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@dataclass(frozen=True, slots=True)
class Connection:
    """The connection of a command."""

    client: Client
    bus: Bus
    prefix: str
    name: str  # of the server, without secrets

    async def partitions(self) -> int:
        """Return the number of partitions; raises AgxError where no service has ever run here."""
        partitions = await read_partitions(self.bus, self.prefix)
        if partitions is None:
            raise AgxError(
                f"no service has run on prefix {self.prefix!r} at {self.name} in the last day: "
                "check --prefix and --redis"
            )
        return partitions


def add_command(
    commands: Commands, name: str, *, help: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Add a command; its `--help` ends with the examples, a line each."""
    return commands.add_parser(
        name,
        help=help,
        description="\n".join(wrap(description, _WIDTH)),
        epilog="\n  ".join(("examples:", *examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the connection, and --json."""
    parser.add_argument("--redis", metavar="URL", help="address of Redis (default: AGX_REDIS_URL, else this machine)")
    parser.add_argument("--prefix", metavar="TEXT", help="prefix of all keys (default: AGX_KEY_PREFIX, else agx)")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def add_session(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a session."""
    parser.add_argument(
        "session", metavar="SESSION", help="SCOPE/USER/SESSION; for a live run its session or run id is enough"
    )


@asynccontextmanager
async def connect(args: argparse.Namespace) -> AsyncIterator[Connection]:
    """Connect, and configure agx in this process; raises AgxError where Redis can't be reached or refuses."""
    given = {"AGX_REDIS_URL": args.redis, "AGX_KEY_PREFIX": args.prefix}
    environ = {**os.environ, **{name: value for name, value in given.items() if value}}
    address, prefix = read_address(environ), read_prefix(environ)
    client = open_redis(address, socket_connect_timeout=3.0)
    configure(Config(redis=client, key_prefix=prefix))
    try:
        yield Connection(client, current_engine().control, prefix, address.place)
    except AuthenticationError as error:
        raise AgxError(
            f"Redis at {address.place} asks for a password, or refuses the one it got ({error}): "
            "set AGX_REDIS_PASSWORD to the right one, and put the user's name into the URL"
        ) from error
    except (RedisError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise RedisUnavailableError(f"look at the runs at {address.place}", error) from error
    finally:
        await aclose()
        await client.aclose()


async def find_session(connection: Connection, text: str) -> SessionKeys:
    """Return the session that a text names.

    Raises:
        AgxError: none or several live sessions have that name, or it is not a valid name.
    """
    parts = text.split("/")
    try:
        if len(parts) == 3:
            return SessionKeys.of(connection.prefix, *parts)
    except ValueError as error:
        raise AgxError(f"{text!r} names no session: {error}") from None
    live = await find_live(connection.bus, connection.prefix, await connection.partitions())
    found = {run.session.stream: run.session for run in live if text in (run.session.session, run.run_id)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise AgxError(f"no live session or run is called {text!r}: name it as SCOPE/USER/SESSION, or see `agx ls`")
    names = ", ".join(session.path for session in found.values())
    raise AgxError(f"{len(found)} live sessions are called {text!r}: {names}")
