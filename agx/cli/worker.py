"""`agx worker`: runs a `Worker` that a module makes, until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import shlex
import sys
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config, configure, current_config
from ..engine.registry import aclose
from ..errors import AgxError, NotConfiguredError
from ..redis.address import Client, open_redis, read_address, read_prefix
from .options import Commands, add_command
from .worker_health import serve_health

if TYPE_CHECKING:
    from ..jobs.worker import Worker

logger = logging.getLogger("agx")

_STOP_TIMEOUT = 60  # seconds in which a worker may hand its runs over before a reload kills it


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "worker",
        help="run submitted jobs, and runs whose process died",
        description="Imports MODULE and runs its Worker until SIGTERM or Ctrl-C. Other workers then continue its runs. "
        "If MODULE does not call agx.configure(), Redis comes from AGX_REDIS_URL and AGX_KEY_PREFIX.",
        examples=(
            "agx worker shop.agents:worker --reload",
            "agx worker shop.agents:worker --at-once 50 --health 0.0.0.0:8081",
        ),
    )
    parser.add_argument("worker", metavar="MODULE:WORKER", help="a module, and the name of an agx.Worker in it")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="runs at the same time (default: as the Worker has it)"
    )
    parser.add_argument("--health", metavar="HOST:PORT", help="serve /healthz and /readyz there")
    parser.add_argument("--reload", action="store_true", help="for development: restart when a Python file changes")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return _reload(args) if args.reload else asyncio.run(_work(args))


async def _work(args: argparse.Namespace) -> int:
    worker = find_worker(args.worker)
    if args.at_once is not None:
        if args.at_once < 1:
            raise AgxError("--at-once must be at least 1")
        worker.at_once = args.at_once
    client = _configure_from_environment()
    try:
        async with AsyncExitStack() as stack:
            if args.health is not None:
                await stack.enter_async_context(serve_health(worker, args.health))
            logger.info("agx: this worker serves %s, %d runs at once", ", ".join(worker.recipes), worker.at_once)
            await worker.run()
        logger.info("agx: this worker has stopped")
    finally:
        await aclose()
        if client is not None:
            await client.aclose()
    return 0


def find_worker(text: str) -> Worker:
    """Return the worker that `MODULE:NAME` names.

    Raises:
        AgxError: there is no such module or name, or it is no `Worker`.
        Exception: whatever the module raises while it is imported.
    """
    from ..jobs.worker import Worker  # noqa: PLC0415 - pydantic-ai's import takes a second

    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise AgxError(f"{text!r} names no worker: write MODULE:WORKER, for example shop.agents:worker")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that this one imports is missing
        raise AgxError(f"there is no module {module_name!r}: start agx in the directory that contains it") from None
    worker = getattr(module, name, None)
    if worker is None:
        raise AgxError(f"module {module_name!r} has no {name!r}")
    if not isinstance(worker, Worker):
        raise AgxError(f"{text} is not an agx.Worker but a {type(worker).__name__}")
    return worker


def _configure_from_environment() -> Client | None:
    """Configure agx if the module has not; returns the client to close."""
    try:
        current_config()
    except NotConfiguredError:
        client = open_redis(read_address(os.environ))
        configure(Config(redis=client, key_prefix=read_prefix(os.environ)))
        return client
    return None


def _reload(args: argparse.Namespace) -> int:
    """Run the worker in a child process, and start a new one whenever a Python file below this directory changes."""
    if find_spec("watchfiles") is None:
        raise AgxError("--reload needs the package watchfiles: pip install 'opale-agent-stream[worker]'")
    from watchfiles import PythonFilter, run_process  # noqa: PLC0415 - it is an extra's

    command = [sys.argv[0], "worker", args.worker]
    for option, value in (("--at-once", args.at_once), ("--health", args.health)):
        command += [option, str(value)] if value is not None else []
    run_process(
        Path.cwd(),
        target=shlex.join(command),
        target_type="command",
        watch_filter=PythonFilter(),
        sigint_timeout=_STOP_TIMEOUT,
    )
    return 0
