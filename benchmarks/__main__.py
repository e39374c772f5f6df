"""`python -m benchmarks [PART ...] [--write]`: measure, print the tables with their ratios, keep them in the README."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agx.embedded.server import EmbeddedServer

from . import machine, report, workers
from .cancels import measure_cancels
from .checkpoints import Checkpointed, compare
from .delay import measure_paced
from .fanout import Crowd, Received, measure_crowd
from .http import measure_http
from .idle import Idle, hold_sessions, weigh_runs
from .replay import measure_replay
from .report import Row
from .request import measure_request
from .stalls import measure_stalls
from .startup import measure_startup
from .tokens import Costs, flat_out
from .users import measure_users

_IDLE_SECONDS = 120.0
_CLIENTS = ("--maxclients", "20000")  # the peer opens one connection a listener


@contextmanager
def server() -> Iterator[EmbeddedServer]:
    """A fresh server on its core."""
    with EmbeddedServer(options=_CLIENTS) as fresh:
        yield fresh


def _flat_out(sessions: int, deltas: int, *, rounds: int, peer_rounds: int = 0) -> dict[str, Costs]:
    with server() as fresh:
        costs = workers.measure(machine.CLIENT_CORE, flat_out, fresh.url, (sessions, deltas), (rounds, peer_rounds))
    return {cost.name: cost for cost in costs}


def measure_tokens() -> list[Row]:
    """What a delta costs flat out."""
    rows = []
    for what, sessions, deltas, rounds, goal in (
        ("wall and CPU per text delta, 40 sessions flat out", 40, 500, 5, 1.10),
        ("one session alone flat out", 1, 2_000, 11, 1.15),
    ):
        costs = _flat_out(sessions, deltas, rounds=rounds, peer_rounds=3)
        ours = costs["agx"]
        rows.append(
            Row(
                f"{what}, over the bare loop",
                f"at most {goal:.2f}",
                f"{costs['limit'].cost.wall_us:.0f} us",
                _ratios(ours),
                _ratios(costs["peer"]),
                max(ours.wall_ratio, ours.cpu_ratio) <= goal,
            )
        )
        hook = _ratios(costs["hooked"])
        rows.append(Row("of that, pydantic-ai's own, with a capability that does nothing", "", hook, "", ""))
    short = _flat_out(40, 1, rounds=7, peer_rounds=3)
    fixed = {name: short[name].cost.cpu_us - short["limit"].cost.cpu_us for name in ("agx", "peer")}
    rows.append(
        Row(
            "CPU of a run around its deltas: lease, begin, facts, end, release",
            "",
            f"{short['limit'].cost.cpu_us / 1e3:.1f} ms",
            f"{fixed['agx'] / 1e3:+.2f} ms",
            f"{fixed['peer'] / 1e3:+.2f} ms",
        )
    )
    return rows


def _ratios(cost: Costs) -> str:
    return f"{cost.wall_ratio:.2f} wall, {cost.cpu_ratio:.2f} CPU"


def measure_delay() -> list[Row]:
    """100 sessions at 30 tokens a second, listened to by another process."""
    with server() as fresh:
        paced = {row.name: row for row in measure_paced(fresh.url, 100, 150, 3)}
    ours, lean, peer = paced["agx"], paced["lean"], paced["peer"]
    assert ours.delays is not None
    assert lean.delays is not None
    more = ours.delays.p50 - lean.delays.p50, ours.delays.p99 - lean.delays.p99
    return [
        Row(
            "CPU per delta at 30 tokens/s, 100 sessions, over the bare loop",
            "at most 1.15",
            f"{paced['limit'].cpu_us:.0f} us",
            f"{ours.cpu_ratio:.2f}",
            f"{peer.cpu_ratio:.2f}",
            ours.cpu_ratio <= 1.15,
        ),
        Row(
            "delay from the model's chunk to a listener in another process, p50 / p99, same load",
            "8 / 25 ms more than a lean XREAD reader",
            str(lean.delays),
            f"{ours.delays}: {more[0]:+.1f} / {more[1]:+.1f}",
            str(peer.delays),
            more[0] <= 8 and more[1] <= 25,
        ),
        Row(
            "CPU of the listening process per delta, same load",
            "",
            f"{lean.listening_us:.0f} us",
            f"{ours.listening_us:.0f} us",
            f"{peer.listening_us:.0f} us",
        ),
    ]


def _crowd(name: str, crowd: Crowd) -> Received:
    with server() as fresh:
        return measure_crowd(fresh.url, name, crowd)


def _received(received: Received) -> str:
    if received.delays is None:
        return f"fails: {received.failure}"
    return (
        f"{received.delays}, {received.connections} connections, "
        f"{received.complete} of {received.crowd.listeners} complete, {received.cpu_share:.0%} CPU"
    )


def measure_listeners() -> list[Row]:
    """Many listeners on many sessions, and on one."""
    many, one = Crowd(300, 3_000, 1.0, 6), Crowd(1, 1_000, 10.0, 6)
    ours, peer, default = _crowd("agx", many), _crowd("peer", many), _crowd("peer-default", many)
    alone, peer_alone = _crowd("agx", one), _crowd("peer", one)
    assert ours.delays is not None
    assert alone.delays is not None
    assert peer.delays is not None
    assert peer_alone.delays is not None
    faster = peer_alone.delays.p50 / alone.delays.p50
    lighter = peer_alone.cpu_share / alone.cpu_share
    return [
        Row(
            "3,000 listeners on 300 sessions, 1 event/s each: p50 / p99",
            "at most 4 connections, all complete, p99 below the peer's with its pool raised",
            "",
            _received(ours),
            f"{_received(peer)}; by default it {_received(default)}",
            ours.connections <= 4
            and ours.complete == many.listeners
            and (peer.complete < many.listeners or ours.delays.p99 < peer.delays.p99),
        ),
        Row(
            "1,000 listeners on one session, 10 events/s: p50 / p99",
            "p50 at least 40 times below the peer's, CPU a tenth",
            "",
            f"{_received(alone)}: {faster:.0f} times below, CPU 1/{lighter:.0f}",
            _received(peer_alone),
            faster >= 40 and lighter >= 10,
        ),
        Row(
            "memory per idle listener",
            "",
            "",
            f"{ours.listener_bytes / 1024:.1f} KiB",
            f"{peer.listener_bytes / 1024:.1f} KiB",
        ),
    ]


def measure_cancel() -> list[Row]:
    """Cancel from another process."""
    with server() as fresh:
        ours = measure_cancels(fresh.url, "agx", 50, at_once=1)
        peer = measure_cancels(fresh.url, "peer", 3, at_once=3)
    return [
        Row(
            f"cancel from another process, worst of {mine.count}: {mine.stage}",
            "50 ms",
            "",
            f"{mine.worst_ms:.0f} ms (median {mine.median_ms:.0f})",
            f"{theirs.worst_ms:,.0f} ms",
            mine.worst_ms <= 50,
        )
        for mine, theirs in zip(ours, peer, strict=True)
    ]


@functools.cache
def _hold(scopes: int, seconds: float) -> Idle:
    with server() as fresh:
        held: Idle = workers.measure(
            machine.CLIENT_CORE, hold_sessions, fresh.url, fresh.pid, (10_000, scopes), seconds
        )
    return held


def measure_idleness() -> list[Row]:
    """Sessions about which nothing happens."""
    held = _hold(10_000, _IDLE_SECONDS)
    with server() as fresh:
        weights = {
            name: workers.measure(machine.CLIENT_CORE, weigh_runs, fresh.url, name, 300) / 1024
            for name in ("limit", "agx", "peer")
        }
    return [
        Row(
            f"10,000 idle live sessions in one process: CPU, and memory after {held.seconds:.0f} s",
            "at most 3 % of a core, no growth",
            "",
            f"{held.cpu_share:.1%} (server {held.server_share:.1%}), {held.growth - 1:+.1%}",
            "no renewals",
            held.cpu_share <= 0.03 and held.growth < 1.01,
        ),
        Row(
            "memory per live run",
            "",
            f"{weights['limit']:.0f} KiB",
            f"{weights['agx']:.0f} KiB",
            f"{weights['peer']:.0f} KiB",
        ),
    ]


def measure_growth() -> str:
    """How cost grows: sessions, listeners, scopes."""
    sessions = []
    for count in (1, 10, 100, 1_000):
        costs = _flat_out(count, max(30, 10_000 // count), rounds=3 if count < 1_000 else 1, peer_rounds=1)
        limit = f"{costs['limit'].cost.cpu_us:.0f} us"
        sessions.append([f"{count:,}", limit, _ratios(costs["agx"]), _ratios(costs["peer"])])
    listeners = []
    for count in (10, 100, 1_000, 10_000):
        crowd = Crowd(max(1, count // 10), count, 1.0, 5)
        ours = _crowd("agx", crowd)
        peer = _crowd("peer", crowd) if count < 10_000 else None
        listeners.append(
            [
                f"{count:,}",
                _received(ours),
                f"{ours.cpu_us:.0f} us",
                "" if peer is None else _received(peer),
                "" if peer is None else f"{peer.cpu_us:.0f} us",
            ]
        )
    scopes = []
    for count, seconds in ((1, 15.0), (100, 15.0), (10_000, _IDLE_SECONDS)):
        held = _hold(count, seconds)
        scopes.append(
            [
                f"{count:,}",
                f"{held.start_us:.0f} us",
                f"{held.cpu_share:.1%}",
                f"{held.server_share:.1%}",
                f"{held.keys}",
            ]
        )
    return "\n\n".join(
        [
            "Sessions at once, flat out; 10,000 deltas among them, at least 30 each:",
            report.table(["sessions", "limit, CPU per delta", "agx over it", "peer over it"], sessions),
            "Listeners, ten a session, 1 event/s each:",
            report.table(["listeners", "agx", "CPU per delivery", "peer", "CPU per delivery"], listeners),
            "Scopes, over which 10,000 idle live sessions are spread:",
            report.table(["scopes", "CPU to start and stop one", "CPU while idle", "server", "keys a session"], scopes),
        ]
    )


def measure_checkpoints() -> list[Row]:
    """Runs that another process could resume, beside runs that none could (`limit`)."""
    with server() as fresh:
        cost: Checkpointed = workers.measure(machine.CLIENT_CORE, compare, fresh.url, 3)
    later = cost.first_token_ms[1] - cost.first_token_ms[0]
    fixed, first, size = cost.fixed_us, cost.first_token_ms, cost.stream_bytes
    return [
        Row(
            "CPU per delta with checkpoints, 40 sessions flat out, over the same without",
            "at most 1.02", "", f"{cost.delta_ratio:.3f}", "", cost.delta_ratio <= 1.02,
        ),
        Row(
            "from `run()` until the model is asked, with checkpoints",
            "at most 10 ms later", f"{first[0]:.2f} ms", f"{first[1]:.2f} ms", "", later <= 10,
        ),
        Row("CPU of a run with one delta, with checkpoints", "", f"{fixed[0]:.0f} us", f"{fixed[1]:.0f} us", ""),
        Row("bytes of its entries, with checkpoints", "", f"{size[0]:,} B", f"{size[1]:,} B", ""),
    ]  # fmt: skip


PARTS: dict[str, Callable[[], list[Row]]] = {
    "tokens": measure_tokens,
    "delay": measure_delay,
    "checkpoints": measure_checkpoints,
    "listeners": measure_listeners,
    "http": measure_http,
    "request": measure_request,
    "stalls": measure_stalls,
    "replay": measure_replay,
    "startup": measure_startup,
    "cancel": measure_cancel,
    "idle": measure_idleness,
    "users": measure_users,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or growth; all by default")
    parser.add_argument("--write", action="store_true", help="keep the tables in benchmarks/README.md")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - {*PARTS, "growth"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    machine.pin(machine.SERVER_CORE)
    started = time.monotonic()
    rows: list[Row] = []
    for name, measure in PARTS.items():
        if not asked.parts or name in asked.parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += measure()
    tables = [report.table(report.HEADINGS, [row.cells() for row in rows])] if rows else []
    if not asked.parts or "growth" in asked.parts:
        print("growth ...", file=sys.stderr, flush=True)
        tables.append(measure_growth())
    tables.append(f"Measured on: {machine.describe()}. It took {time.monotonic() - started:.0f} s.")
    measured = "\n\n".join(tables)
    print(measured)
    if asked.write:
        report.write(measured)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
