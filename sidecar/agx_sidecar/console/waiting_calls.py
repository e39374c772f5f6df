"""The tool calls that wait for a decision: reads and shows them, and stores what a visitor decides."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence

import orjson

from agx.control.approvals import Approvals, Decision, PendingCall
from agx.facts.schema import FIELD, encode
from agx.fleet.fleet import read_clock, read_partitions
from agx.redis import keys
from agx.redis.bus import Bus
from agx.redis.keys import SessionKeys

from .formatting import ago, run_url, session_name
from .html import Html, h

_MOST = 50  # calls, the oldest first
_SHOWN = 4_000  # characters of arguments
# Controls of direction, spaces without width and C1 controls, but not the joiners that some scripts need.
_UNSEEN = re.compile("[\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_LABELS = {"approve": "Approve", "deny": "Deny"}


class NoLongerWaitsError(Exception):
    """The call does not exist, was decided on already, or can't be decided on in a console."""


async def read_waiting(bus: Bus, prefix: str, partitions: int) -> list[PendingCall]:
    """Return the calls of all scopes on which nobody has decided, the oldest first."""
    approvals = Approvals(bus, prefix, partitions)
    found = await asyncio.gather(*(approvals.read(n) for n in range(partitions)))
    calls = [call for calls in found for call in calls if call.decision is None]
    return sorted(calls, key=lambda call: call.since_ms)


async def decide(bus: Bus, prefix: str, form: Mapping[str, str], by: str) -> tuple[PendingCall, Decision]:
    """Store a visitor's decision, count it, and wake the workers: one of them goes on with the run.

    Raises:
        ValueError: the form names no session, or no decision.
        NoLongerWaitsError: there is nothing to decide.
    """
    session = SessionKeys.of(prefix, form.get("scope", ""), form.get("user", ""), form.get("session", ""))
    action = form.get("decision", "")
    if action not in _LABELS:
        raise ValueError("no decision")
    partitions = await read_partitions(bus, prefix) or 1
    approvals, call_id = Approvals(bus, prefix, partitions), form.get("call", "")
    ids = (session.scope, session.user, session.session)
    waiting = await approvals.read_scope(session.scope)
    call = next((one for one in waiting if one.session == ids and one.call_id == call_id), None)
    if call is None or call.decision is not None or action not in _actions(call):
        raise NoLongerWaitsError
    # Two visitors, or one who clicks twice: the first decision holds, and only that one is counted.
    decision = Decision(approve=action == "approve", by=by, key=uuid.uuid4().hex)
    if await approvals.decide(session, call_id, decision) != decision:
        raise NoLongerWaitsError
    queue = keys.queue(prefix, keys.partition(session.scope, partitions))
    await bus.execute("XADD", queue, "*", FIELD, encode(call.make_fact(decision, await read_clock(bus))))
    await bus.execute("EXPIRE", queue, keys.QUEUE_TTL)
    await bus.execute("PUBLISH", keys.jobs_wake_channel(prefix), keys.WAKE_DECIDED)
    return call, decision


def _actions(call: PendingCall) -> tuple[str, ...]:
    """Return the decisions that the console allows. It can't give a result, nor approve arguments that it cuts."""
    if call.recipe is None:
        return ()
    return ("approve", "deny") if call.kind == "approval" and len(_arguments(call)) <= _SHOWN else ("deny",)


def _arguments(call: PendingCall) -> str:
    """Return the arguments as JSON; what is not seen, or shows the text after it in another order, is escaped."""
    text = orjson.dumps(call.args, option=orjson.OPT_INDENT_2).decode()
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def waiting_view(calls: Sequence[PendingCall], now_ms: int, *, can_write: bool, content: bool) -> Html | None:
    """Return the section of the index page; None where nothing waits.

    `can_write` and `content` together give the buttons: nobody approves what the page hides.
    """
    if not calls:
        return None
    heading = h("h2", "Waiting for a decision ", h("span", f"{len(calls):,}", class_="count"), id="h-waiting")
    items = [_item(call, now_ms, decides=can_write and content, content=content) for call in calls[:_MOST]]
    needs = [name for name, has in (("AGX_CONSOLE=full", can_write), ("AGX_CONSOLE_CONTENT=1", content)) if not has]
    note = h("p", f"Set {' and '.join(needs)} to decide here.", class_="quiet") if needs else None
    return h("section", heading, note, h("ul", items, class_="waiting"))


def _item(call: PendingCall, now_ms: int, *, decides: bool, content: bool) -> Html:
    run = h("a", call.agent, href=run_url(call.scope_id, call.run_id, call.user_id, call.session_id, 0))
    times = f"waiting for {ago(now_ms - call.since_ms)}"
    if call.expires_ms is not None:
        times += f", denied in {ago(call.expires_ms - now_ms)}"
    args = _arguments(call)
    return h(
        "li",
        h("div", h("code", call.tool), " of ", run, " · ", session_name(*call.session), class_="call"),
        h("span", times, class_="quiet"),
        h(
            "pre",
            f"{args[:_SHOWN]} …" if len(args) > _SHOWN else args,
            tabindex=0,
            role="region",
            aria_label=f"Arguments of {call.tool}",
        )
        if content and call.args
        else None,
        _form(call) if decides else None,
        id=f"c-{'/'.join(call.session)}/{call.call_id}",
    )


def _form(call: PendingCall) -> Html:
    fields = {"scope": call.scope_id, "user": call.user_id, "session": call.session_id, "call": call.call_id}
    hidden = [h("input", type="hidden", name=name, value=value) for name, value in fields.items()]
    buttons = [
        h("button", _LABELS[name], h("span", f" {call.tool}", class_="unseen"), name="decision", value=name,
          class_="danger" if name == "deny" else "good")
        for name in _actions(call)
    ]  # fmt: skip
    if not buttons:
        return h("p", "The service that ran the agent decides on this call.", class_="quiet")
    note = h("span", "It waits for a result from another system.", class_="quiet") if call.kind == "result" else None
    return h("form", hidden, buttons, note, method="post", action="/decide", class_="find")
