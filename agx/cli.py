"""The `agx` command: what it takes, and which part of the package does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from . import __version__
from .errors import AgxError

# What `agx demo` imports beyond the package's own dependencies.
_DEMO_PACKAGES = ("genai_prices", "opentelemetry.exporter.otlp", "opentelemetry.sdk", "prometheus_client", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 well, 1 not, 2 wrong usage, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return _demo(args)
    except AgxError as error:
        print(f"agx {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agx", description="Runs pydantic-ai agents for a service, and shows them.")
    parser.add_argument("--version", action="version", version=f"agx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="run agents on an embedded server, with the sidecar beside them, and watch",
        description="Starts an embedded Valkey and the sidecar, and runs agents whose scripted model needs no key. "
        "Some runs complete, some are cancelled, some fail, some lose their process. At the end, what ran is compared "
        "with the sidecar's /metrics; the exit code is 0 only if they agree exactly.",
    )
    demo.add_argument("--once", action="store_true", help="a few runs of each outcome, then end; else until Ctrl-C")
    demo.add_argument(
        "--model",
        metavar="NAME",
        help="a real model instead of the scripted one, by pydantic-ai's name for it, such as openai:gpt-4o-mini; "
        "its key is read from the environment",
    )
    return parser


def _demo(args: argparse.Namespace) -> int:
    if missing := [name for name in _DEMO_PACKAGES if not _is_installed(name)]:
        raise AgxError(f"it needs {', '.join(missing)}: pip install 'opale-agent-stream[demo]'")
    from .demo.command import run_demo  # noqa: PLC0415 - its imports need the extra

    return run_demo(once=args.once, model=args.model)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package
        return False
