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
from ..facts.schema import RunEnded
from ..fleet.fleet import find_live, read_newest, read_partitions
from ..redis.address import (
    Client,
    open_redis,
    read_address,
    read_prefix,
)
from ..redis.bus import Bus
from ..redis.keys import SessionKeys

_NEWEST = 2_000  # facts of each partition that are searched for an ended session
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
    """Add the options for the connection, and --json.

    They have no default: a default of the command would replace a value that was given before the command.
    """
    unset = argparse.SUPPRESS
    address, prefix = (
        "address of Redis (default: AGX_REDIS_URL, else this machine)",
        "prefix of all keys (default: AGX_KEY_PREFIX, else agx)",
    )
    parser.add_argument("--redis", metavar="URL", default=unset, help=address)
    parser.add_argument("--prefix", metavar="TEXT", default=unset, help=prefix)
    parser.add_argument("--json", action="store_true", default=unset, help="print JSON, errors too, for scripts")
    parser.set_defaults(connects=True)


def add_session(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a session."""
    parser.add_argument(
        "session", metavar="SESSION", help="SCOPE/USER/SESSION; for a recent run its session or run id is enough"
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
    """Return the session that a text names: a live one, else one whose run has ended lately.

    Raises:
        AgxError: none or several sessions have that name, or it is not a valid name.
    """
    parts = text.split("/")
    try:
        if len(parts) == 3:
            return SessionKeys.of(connection.prefix, *parts)
    except ValueError as error:
        raise AgxError(f"{text!r} names no session: {error}") from None
    bus, prefix, partitions = connection.bus, connection.prefix, await connection.partitions()
    live = await find_live(bus, prefix, partitions)
    found = {run.session for run in live if text in (run.session.session, run.run_id)}
    if not found:
        newest = await read_newest(bus, prefix, partitions, _NEWEST, "run.end")
        ended = [fact for fact in newest.facts if isinstance(fact, RunEnded) and fact.session is not None]
        found = {
            SessionKeys(prefix, fact.scope, str(fact.user), str(fact.session))
            for fact in ended
            if text in (fact.session, fact.run_id)
        }
    if len(found) == 1:
        return found.pop()
    if not found:
        raise AgxError(
            f"no live or recent session or run is called {text!r}: name it as SCOPE/USER/SESSION, or see `agx ls`"
        )
    raise AgxError(f"{len(found)} sessions are called {text!r}: {', '.join(sorted(one.path for one in found))}")
