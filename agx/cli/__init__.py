"""The `agx` command: which commands there are, and what their exit codes mean. One file a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="agx",
        description="Runs pydantic-ai agents for a service, and shows them.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"agx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as `agx --help` explains them."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except AgxError as error:
        print(f"agx {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe, as `agx tail | head` does: nothing may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
