"""The `agx` command: which commands there are, and what their exit codes mean. One file a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import AgxError
from . import (
    demo,
    doctor,
    ls,
    sessions,
    stats,
    tail,
    worker,
)
from .options import add_connection_options
from .terminal import print_json

_COMMANDS = (demo, ls, tail, sessions, stats, doctor, worker)
_CODES = """exit codes:
  0    done
  1    not done: Redis can't be reached, a setting is wrong, a session is not
       known
  2    wrong usage
  3    done, and the answer is no: nothing live to cancel, a run that did not
       complete, a fault found by `doctor`
  130  stopped by Ctrl-C
"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage as JSON if the command line has `--json`."""

    argv: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        if "--json" not in _Parser.argv:
            super().error(message)
        print_json({"error": "UsageError", "message": f"{self.prog}: {message}"}, sys.stderr)
        self.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="agx",
        description="Runs pydantic-ai agents for a service, and shows them.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"agx {__version__}")
    add_connection_options(parser)
    parser.set_defaults(redis=None, prefix=None, json=False, connects=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as `agx --help` explains them."""
    _Parser.argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.connects and (args.redis or args.prefix or args.json):
        parser.error(f"{args.command} takes none of --redis, --prefix and --json")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except AgxError as error:
        if args.json:
            print_json({"error": type(error).__name__, "message": str(error)}, sys.stderr)
        else:
            print(f"agx {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe, as `agx tail | head` does: nothing may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
