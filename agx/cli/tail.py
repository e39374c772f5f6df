"""`agx tail`: follow a session's run as it happens."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

import orjson

from ..error_codes import RUN_CANCELED
from ..errors import AgxError
from ..facts.outcome_marks import COLOURS
from ..listeners.listener import follow
from ..stream.entry import PROMPT, StreamEntry
from .options import (
    Commands,
    add_command,
    add_connection_options,
    add_session,
    connect,
    find_session,
)
from .terminal import format_duration, open_console, without_control

if TYPE_CHECKING:
    from rich.console import Console

_WAIT = 3.0  # seconds for a first event
_DEEPEST = 9  # levels of sub-agents that are indented
_CUT = 400  # characters of arguments and results


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "tail",
        help="follow a run",
        description="Shows a session's run from its begin to its end, as it happens. Exit code 3: it did not "
        "complete. With --json one event a line, as listen() yields them.",
        examples=("agx tail acme/ada/chat-1", "agx tail chat-1 --json > chat-1.jsonl"),
    )
    add_session(parser)
    parser.add_argument("--after", metavar="ID", help="start after this event")
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_tail(args)))


async def _tail(args: argparse.Namespace) -> int:
    async with connect(args) as connection:
        session = await find_session(connection, args.session)
        screen = None if args.json else Screen(open_console())
        ids = (session.scope, session.user, session.session)
        last: StreamEntry | None = None
        try:
            # A live run may be silent for any time; a run whose process died is noticed.
            async for entry in follow(*ids, wait=_WAIT, timeout=None, after=args.after):
                last = entry
                if screen is None:
                    print(entry.to_json(), flush=True)
                else:
                    screen.show(entry)
        except ValueError as error:
            raise AgxError(str(error)) from None
    if last is None:
        raise AgxError(f"{session.path} has no events: it is not live, and events are kept only for some time")
    return 0 if last.type == "end" and last.body.get("outcome", "completed") == "completed" else 3


class Screen:
    """Prints events for people: text is written continuously, everything else has a line of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._flows: tuple[str, str] | None = None  # the kind of part whose text is being written, and its margin
        self._began_ms: int | None = None

    def show(self, entry: StreamEntry) -> None:
        """Print one event."""
        body, kind, at_ms = entry.body, entry.type, entry.id[0]
        if kind == "event":
            depth = body.get("depth") if entry.is_from_sub_agent else 0
            levels = min(depth, _DEEPEST) if isinstance(depth, int) else 1
            self._show_step(body, f"{'  ' * levels}{body.get('agent')} │ " if entry.is_from_sub_agent else "")
        elif kind == "begin":
            self._began_ms = at_ms
            self._line(f"● {body.get('agent', 'a session')}  run {body.get('run_id', '?')}", "bold cyan")
        elif kind == "end":
            outcome = str(body.get("outcome") or "completed")
            took = f" in {format_duration(at_ms - self._began_ms)}" if self._began_ms is not None else ""
            reason = f" ({body['reason']})" if body.get("reason") else ""
            self._line(f"● {outcome}{took}{reason}", f"bold {COLOURS.get(outcome, '')}")
        elif kind == "resume":
            void = "; the unfinished step above does not count" if body.get("void") or body.get("void_runs") else ""
            self._line(f"● resumed by another process (attempt {body.get('attempt', '?')}){void}", "bold cyan")
        elif kind == "info" and entry.origin == PROMPT:
            self._line(f"> {body.get('prompt') or 'goes on with the decided calls'}", "bold")
        elif body.get("code") != RUN_CANCELED.code:  # the `end` has it
            text = " ".join(str(body[name]) for name in ("error_type", "msg") if body.get(name))
            self._line(f"{kind}: {text or _json(body)}", "red" if kind == "error" else "cyan")

    def _show_step(self, body: dict[str, Any], margin: str) -> None:
        """Print a step; `margin` names the sub-agent whose step it is."""
        part, name = body.get("part_kind"), body.get("tool_name")
        if part in ("text", "thinking"):
            self._flow(part, str(body.get("content", "")) + str(body.get("content_delta", "")), margin)
        elif part == "tool-call":
            self._line(f"{margin}⚙ {name}({_json(body.get('args', {}))[1:-1]})", "blue")
        elif part == "tool-return":
            self._line(f"{margin}  ↳ {body.get('tool_outcome', 'ok')}  {name}: {_json(body.get('content'))}", "dim")
        elif body.get("event") == "llm-begin":
            self._line(f"{margin}model request, idx {body.get('idx')}  {body.get('model', '')}", "dim")
        elif body.get("event") == "part_start":
            self._line(f"{margin}{part} {_json({key: body[key] for key in body if key not in _KNOWN})}", "dim")

    def _flow(self, part: str, text: str, margin: str) -> None:
        if self._flows != (part, margin):
            self._end_flow()
            self._flows = part, margin
            text = margin + text
        self._console.print(_styled(text, "dim italic" if part == "thinking" else ""), end="", soft_wrap=True)

    def _line(self, text: str, style: str) -> None:
        self._end_flow()
        self._console.print(_styled(text, style), soft_wrap=True)

    def _end_flow(self) -> None:
        if self._flows is not None:
            self._console.print()
            self._flows = None


_KNOWN = {"idx", "event", "event_idx", "part_kind", "seq"}


def _styled(text: str, style: str) -> Any:
    from rich.text import Text  # noqa: PLC0415 - it is an extra's

    return Text(without_control(text), style)


def _json(value: object) -> str:
    try:
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return "nested too deeply to be shown"
    return text if len(text) <= _CUT else f"{text[:_CUT]}…"
