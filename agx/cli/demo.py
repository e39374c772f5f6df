"""`agx demo`: the whole flow on an embedded server; see `agx.demo`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from ..errors import AgxError
from .options import Commands, add_command

# What it imports beyond the package's own dependencies.
_PACKAGES = ("genai_prices", "opentelemetry.exporter.otlp", "opentelemetry.sdk", "prometheus_client", "rich")


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    demo = add_command(
        commands,
        "demo",
        help="run agents on an embedded server, with the sidecar beside them, and watch",
        description="Starts an embedded Valkey and the sidecar, and runs agents whose scripted model needs no key. "
        "Some runs complete, some are cancelled, some fail, and the process of one is killed: another process resumes "
        "it. At the end, what ran is compared with the sidecar's "
        "/metrics; the exit code is 0 only if they agree. Where a provider reported no tokens, agx estimates them: "
        "there the table has the least that it may count.",
        examples=("agx demo", "agx demo --once", "OPENAI_API_KEY=... agx demo --model openai:gpt-4o-mini"),
    )
    demo.add_argument("--once", action="store_true", help="a few runs of each outcome, then end; else until Ctrl-C")
    demo.add_argument(
        "--model",
        metavar="NAME",
        help="a real model instead of the scripted one, by pydantic-ai's name for it, such as openai:gpt-4o-mini; "
        "its key is read from the environment",
    )
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    if missing := [name for name in _PACKAGES if not _is_installed(name)]:
        raise AgxError(f"it needs {', '.join(missing)}: pip install 'opale-agent-stream[demo]'")
    if sys.stderr.isatty():
        print("Starting a server and the sidecar ...", file=sys.stderr)
    # The banner recommends a tool for observing agents; these are observed by agx already.
    os.environ.setdefault("PYDANTIC_AI_NO_BANNER", "1")
    from ..demo.command import run_demo  # noqa: PLC0415 - its imports need the extra

    return run_demo(once=args.once, model=args.model)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package
        return False
