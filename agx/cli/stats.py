"""`agx stats`: the fleet in figures, from the leases and the newest facts."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from typing import Any, get_args

from ..facts.schema import NodeEnded, Outcome, ProcessState, RunEnded
from ..fleet.fleet import (
    NewestFacts,
    find_dead,
    find_live,
    read_clock,
    read_newest,
)
from ..redis import keys
from .options import (
    Commands,
    Connection,
    add_command,
    add_connection_options,
    connect,
)
from .terminal import format_duration, print_json, print_table

_OUTCOMES = get_args(Outcome)
_HEARTBEAT_LIFE_NS = 30_000_000_000  # a process without a heartbeat for so long is gone


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "stats",
        help="the fleet in figures",
        description="Counts live runs, and the newest facts in the scope queues: outcomes, durations, tokens. "
        "For history and rates use the sidecar's /metrics.",
        examples=("agx stats", "agx stats --facts 10000 --json | jq .agents"),
    )
    parser.add_argument(
        "--facts", type=int, default=2_000, metavar="N", help="how many of each partition are read (default: 2000)"
    )
    add_connection_options(parser)
    parser.set_defaults(run=lambda args: asyncio.run(_stats(args)))


async def _stats(args: argparse.Namespace) -> int:
    async with connect(args) as connection:
        figures = await _measure(connection, max(1, args.facts))
    if args.json:
        print_json(figures)
    else:
        _show(figures)
    return 0


async def _measure(connection: Connection, depth: int) -> dict[str, Any]:
    partitions, now_ms = await connection.partitions(), await read_clock(connection.bus)
    live = await find_live(connection.bus, connection.prefix, partitions)
    dead, recovering = await find_dead(connection.bus, live, now_ms)
    newest = await read_newest(connection.bus, connection.prefix, partitions, depth, "run.end", "node", "process")
    lengths = [connection.bus.execute("XLEN", keys.queue(connection.prefix, n)) for n in range(partitions)]
    return {
        "prefix": connection.prefix,
        "now_ms": now_ms,
        "live": len(live),
        "dead": len(dead),
        "recovering": len(recovering),
        "live_by_scope": dict(Counter(run.session.scope for run in live).most_common()),
        "facts_read": newest.read,
        "since_ms": newest.since_ms or None,
        "agents": _by_agent(newest),
        "services": _by_service(newest, now_ms),
        "queue_lengths": await asyncio.gather(*lengths),
    }


def _by_agent(newest: NewestFacts) -> dict[str, dict[str, Any]]:
    agents: dict[str, dict[str, Any]] = {}
    durations: dict[str, list[int]] = {}
    for fact in newest.facts:
        if not isinstance(fact, RunEnded | NodeEnded):
            continue
        figures = agents.setdefault(
            fact.agent, dict.fromkeys((*_OUTCOMES, "model_calls", "tool_calls", "input_tokens", "output_tokens"), 0)
        )
        if isinstance(fact, RunEnded):
            figures[fact.outcome] += 1
            figures["model_calls"] += fact.model_calls
            figures["tool_calls"] += fact.tool_calls
            durations.setdefault(fact.agent, []).append(fact.end_ns - fact.start_ns)
        elif fact.model is not None:
            figures["input_tokens"] += fact.model.usage.input
            figures["output_tokens"] += fact.model.usage.output
    for agent, took in durations.items():
        took.sort()
        for name, share in (("p50_s", 0.5), ("p95_s", 0.95)):
            agents[agent][name] = took[min(len(took) - 1, int(len(took) * share))] / 1e9
    return dict(sorted(agents.items(), key=lambda item: -sum(item[1][name] for name in _OUTCOMES)))


def _by_service(newest: NewestFacts, now_ms: int) -> dict[str, dict[str, int]]:
    """Sum the newest heartbeat of each process."""
    services: dict[str, dict[str, int]] = {}
    seen: set[str | None] = set()
    for fact in newest.facts:
        if not isinstance(fact, ProcessState) or now_ms * 1_000_000 - fact.at_ns > _HEARTBEAT_LIFE_NS:
            continue
        if fact.service.instance in seen:
            continue
        seen.add(fact.service.instance)
        sums = services.setdefault(fact.service.name, {"processes": 0, "listeners": 0, "buffered_events": 0})
        sums["processes"] += 1
        sums["listeners"] += fact.listeners
        sums["buffered_events"] += fact.buffered_events
    return services


def _show(figures: dict[str, Any]) -> None:
    back = (
        f", the last {format_duration(figures['now_ms'] - figures['since_ms'])}"
        if figures["since_ms"]
        else ", all there are"
    )
    without = "".join(f", {figures[state]} of them {state}" for state in ("recovering", "dead") if figures[state])
    print(f"{figures['live']} live{without}; {figures['facts_read']:,} facts{back}")
    numbers = ("RUNS", *(name.upper() for name in _OUTCOMES), "P50", "P95", "MODEL", "TOOLS", "IN", "OUT")
    rows = [
        (
            agent,
            sum(of[name] for name in _OUTCOMES),
            *(of[name] for name in _OUTCOMES),
            *(format_duration(int(of[name] * 1_000)) if name in of else "-" for name in ("p50_s", "p95_s")),
            *(f"{of[name]:,}" for name in ("model_calls", "tool_calls", "input_tokens", "output_tokens")),
        )
        for agent, of in figures["agents"].items()
    ]
    print_table(("AGENT", *numbers), rows, right=numbers, least=("TOOLS", "MODEL", "P50"))
    if figures["services"]:
        counts = ("PROCESSES", "LISTENERS", "BUFFERED")
        print_table(
            ("SERVICE", *counts), [(name, *of.values()) for name, of in figures["services"].items()], right=counts
        )
