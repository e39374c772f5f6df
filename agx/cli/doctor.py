"""`agx doctor`: checks the server and the fleet, and names what to do about each fault."""

from __future__ import annotations

import argparse
import asyncio

from ..errors import AgxError
from .checkup import Finding, check_everything
from .options import (
    Commands,
    add_command,
    add_connection_options,
    connect,
)
from .terminal import open_console, print_json, without_control

_MARKS = {"ok": ("✔", "green"), "warning": ("!", "yellow"), "fault": ("✘", "red")}


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "doctor",
        help="check the server and the fleet, and name what to do",
        description="Checks Redis's version, memory policy and clock, what the user of the URL may do, partitions, "
        "leases without a process, the queues and their readers, and jobs that no worker serves. It changes nothing. "
        "Exit code 3: there is a fault.",
        examples=("agx doctor", "agx doctor --redis rediss://sidecar@redis.internal:6379 --prefix shop"),
    )
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_doctor(args)))


async def _doctor(args: argparse.Namespace) -> int:
    async with connect(args) as connection:
        findings = await check_everything(connection)
    if args.json:
        print_json([_described(finding) for finding in findings])
    else:
        _show(findings)
    return 3 if any(finding.state == "fault" for finding in findings) else 0


def _described(finding: Finding) -> dict[str, str]:
    return {"check": finding.check, "state": finding.state, "said": finding.message, "to_do": finding.to_do}


def _show(findings: list[Finding]) -> None:
    try:
        console = open_console()
    except AgxError:
        # The checks must work without an extra package.
        for finding in findings:
            print(*filter(None, (finding.state, finding.check, finding.message, finding.to_do)), sep="  ")
        return
    from rich.text import Text  # noqa: PLC0415 - it is an extra's

    for finding in findings:
        mark, style = _MARKS[finding.state]
        message = without_control(finding.message)
        console.print(Text.assemble((mark, style), f" {finding.check:<11} ", (message, "")), soft_wrap=True)
        if finding.to_do:
            console.print(Text(f"              → {without_control(finding.to_do)}", style), soft_wrap=True)
