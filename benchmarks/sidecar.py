"""What a fact costs the sidecar: parsed only, as metrics, as spans; its memory over many; what a scrape holds up.

Then what it takes without facts, and with facts that come one by one.

`python -m benchmarks.sidecar [FACTS]`, 1,000,000 by default. Ratios are to parsing the same facts in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import redis
from redis.asyncio import Redis

from agx.embedded.child import Child, draw_ports
from agx.embedded.server import EmbeddedServer
from agx.facts import schema as facts
from agx.facts.decoding import decode
from agx.facts.reader import QueueEntry
from agx.redis import keys
from agx_sidecar.link import Link
from agx_sidecar.metrics.exposition import render
from agx_sidecar.metrics.fold import Fold, Position
from agx_sidecar.metrics.series import Series
from agx_sidecar.source import read_after

from .machine import CLIENT_CORE, SERVER_CORE, cpu_seconds, describe, pin

PARTITIONS = 8
_CEILINGS = {"metrics": 75_000, "spans": 12_500}  # facts/s and core, as prototypes had them on another machine
_FACTS_PER_RUN = 5
_TRACE = "0af7651916cd43dd8448eb211c80319c"
_SERVICE = facts.Service("shop", "1.2.3", "pod-1")


@dataclass(frozen=True, slots=True)
class Rate:
    """Facts per second of a core, and what the process held in memory when a part of them was done (MiB)."""

    name: str
    facts_per_core_second: float
    memory_mib: tuple[int, ...] = ()


def _model_call(n: int, start: int) -> facts.ModelCall:
    return facts.ModelCall(
        provider="openai",
        request_model="gpt-4o-mini",
        response_model="gpt-4o-mini-2024-07-18",
        response_id=f"resp-{n}",
        stream=True,
        finish_reason="stop",
        finish_reason_missing=False,
        first_chunk_ns=150_000_000,
        chunk_counts=(7, 0, 3, *[0] * 12),
        chunk_sum_ns=123_456_789,
        usage=facts.Usage(1_000, 200, 300, 0, 40),
        start_ns=start,
        end_ns=start + 600_000_000,
    )


def a_run(n: int) -> Iterator[facts.Fact]:
    """Five facts: a run with two model requests and a tool call."""
    start = time.time_ns()
    run_id = f"run-{n:010d}"

    def place(span_id: str, parent: str | None) -> facts.Trace:
        return facts.Trace(_TRACE, span_id, parent, sampled=True, sdk=False)

    shared = {
        "scope": f"scope-{n % 50}",
        "user": "u",
        "session": f"s{n}",
        "run_id": run_id,
        "agent": f"agent-{n % 10}",
        "service": _SERVICE,
    }
    root = facts.span_id(run_id, "run")
    yield facts.RunStarted(id=f"{run_id}:start", start_ns=start, trace=place(root, None), **shared)
    for idx in range(2):
        yield facts.NodeEnded(
            id=f"{run_id}:n{idx}",
            node="model_request",
            idx=idx,
            outcome="completed",
            start_ns=start,
            end_ns=start + 700_000_000,
            model=_model_call(n, start),
            trace=place(facts.span_id(run_id, f"n{idx}"), root),
            **shared,
        )
    yield facts.ToolEnded(
        id=f"{run_id}:tool",
        tool="lookup",
        call_id="call-1",
        idx=0,
        outcome="ok",
        start_ns=start,
        end_ns=start + 30_000_000,
        trace=place(facts.span_id(run_id, "tool"), root),
        **shared,
    )
    yield facts.RunEnded(
        id=f"{run_id}:end",
        outcome="completed",
        start_ns=start,
        end_ns=start + 2_000_000_000,
        model_calls=2,
        tool_calls=1,
        stream=facts.StreamTotals(40, 9_000, 0, 0),
        trace=place(root, None),
        **shared,
    )


def fill(url: str, first: int, count: int) -> None:
    """Queue the facts of some runs."""
    with redis.Redis.from_url(url) as client:
        client.hset(keys.meta("agx"), mapping={"format": 1, "partitions": PARTITIONS, "lease_ttl": "15"})
        for begin in range(first, first + count, 200):
            pipeline = client.pipeline(transaction=False)
            for n in range(begin, min(begin + 200, first + count)):
                for fact in a_run(n):
                    _add(pipeline, fact)
            pipeline.execute()


def _add(client: redis.Redis, fact: facts.Fact) -> None:
    assert not isinstance(fact, facts.ProcessState)
    client.xadd(keys.queue("agx", keys.partition(fact.scope, PARTITIONS)), {facts.FIELD: facts.encode(fact)})


def share_of_a_core(url: str, sidecar: SidecarUnderTest, facts_per_second: int, seconds: float = 15.0) -> float:
    """Return the CPU that a sidecar takes while facts come one by one."""
    source = (fact for n in itertools.count(10**6) for fact in a_run(n))
    began, before, added = time.monotonic(), cpu_seconds(sidecar.child.pid), 0
    with redis.Redis.from_url(url) as client:
        while (passed := time.monotonic() - began) < seconds:
            while added < passed * facts_per_second:
                _add(client, next(source))
                added += 1
            time.sleep(0.001 if facts_per_second else 0.5)
    return (cpu_seconds(sidecar.child.pid) - before) / passed


async def parse_only(url: str) -> Rate:
    """Read everything as the sidecar does, and only decode it."""
    async with Redis.from_url(url, protocol=2) as client:
        client.set_response_callback("XREAD", lambda response, **_: response)
        link, count = Link(client), 0
        began = time.process_time()
        for n in range(PARTITIONS):
            after = "0-0"
            while entries := await _read_now(link, keys.queue("agx", n), after):
                for _, payload in entries:
                    decode(payload or b"")
                count += len(entries)
                after = entries[-1][0]
        return Rate("parsed only", count / (time.process_time() - began))


async def _read_now(link: Link, key: str, after: str) -> list[QueueEntry]:
    end = await link.call("XINFO STREAM", key) if await link.call("EXISTS", key) else None
    if end is None or end["last-generated-id"].decode() == after:
        return []
    return (await read_after(link, {key: after})).get(key, [])


class SidecarUnderTest:
    """A real sidecar, on the client's core."""

    def __init__(self, url: str, **environment: str) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="agx-bench-"))
        (self._port,) = draw_ports(1)
        self.child = Child(
            [sys.executable, "-m", "agx_sidecar"],
            log=self._home / "log",
            home=self._home,
            environment={**os.environ, "AGX_REDIS_URL": url, "AGX_HTTP_PORT": str(self._port), **environment},
        )

    def value(self, name: str) -> float:
        """Return the sum of a metric's series; 0 while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return 0.0
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def memory_mib(self) -> int:
        pages = int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

    def end(self) -> None:
        self.child.end(signal.SIGTERM)


def consume(name: str, sidecar: SidecarUnderTest, metric: str, expected: int, facts_queued: int) -> Rate:
    """Wait until a sidecar has dealt with the queue; its start is not counted, scrapes are rare enough not to show."""
    while not (done := sidecar.value(metric)):
        time.sleep(0.05)
    begun, cpu = done, cpu_seconds(sidecar.child.pid)
    memory = [sidecar.memory_mib()]
    while done < expected:
        time.sleep(0.5)
        done = sidecar.value(metric)
        memory.append(sidecar.memory_mib())
    share = (done - begun) / expected
    used = cpu_seconds(sidecar.child.pid) - cpu
    return Rate(name, facts_queued * share / used, tuple(memory[:: max(1, len(memory) // 8)]))


class _Sink(BaseHTTPRequestHandler):
    """A collector that takes everything and looks at nothing."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _serve_sink(port: Connection) -> None:
    pin(SERVER_CORE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    port.send(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """Run a collector in a process of its own; yields its endpoint."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve_sink, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


async def scrape_pause() -> tuple[float, float, int]:
    """Render many series in a thread while facts are folded; return rendering alone, the longest pause, the series."""
    fold = Fold(Series(), Series(), {0: Position()})
    payloads = [facts.encode(fact) for n in range(4_000) for fact in a_run(n)]
    many = [facts.encode(fact) for n in range(60) for fact in a_run(n)]
    for n, payload in enumerate(many):
        for agent in range(40):
            changed = payload.replace(b'"agent":"agent-', b'"agent":"a%d-' % agent).replace(b'"run-', b'"r%d-' % agent)
            fold.apply(0, [QueueEntry(f"1700000000000-{n * 40 + agent}", changed)])
    body, _ = render(fold.series.sample(), "text/plain")
    series = sum(not line.startswith(b"#") for line in body.splitlines())
    began = time.perf_counter()
    render(fold.series.sample(), "text/plain")
    alone = time.perf_counter() - began

    scrape = asyncio.create_task(asyncio.to_thread(render, fold.series.sample(), "text/plain"))
    longest, last, n = 0.0, time.perf_counter(), 0
    while not scrape.done():
        fold.apply(0, [QueueEntry(f"1700000000001-{n}", payloads[n % len(payloads)])])
        n += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        if n % 50 == 0:
            await asyncio.sleep(0)
    return alone, longest, series


def main() -> None:
    """Print the table."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    runs = total // _FACTS_PER_RUN
    print(describe())
    pin(SERVER_CORE)
    with EmbeddedServer() as server, sink() as endpoint:
        pin(CLIENT_CORE)
        fill(server.url, 0, runs)
        rates = [asyncio.run(parse_only(server.url))]
        sidecar = SidecarUnderTest(server.url)
        rates.append(consume("metrics", sidecar, "agx_facts_total", total, total))
        sidecar.end()
        sidecar = SidecarUnderTest(server.url, AGX_SINKS="traces", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        rates.append(consume("spans", sidecar, "agx_spans_exported_total", _FACTS_PER_RUN * runs, total))
        sidecar.end()
    base = rates[0].facts_per_core_second
    for rate in rates:
        per_second = rate.facts_per_core_second
        line = f"{rate.name:12} {per_second:9,.0f} facts/s and core, {per_second / base:.2f}"
        if ceiling := _CEILINGS.get(rate.name):
            line += f" of parsing only (a prototype: {ceiling:,}/s); memory {rate.memory_mib} MiB"
        print(line)
    with EmbeddedServer() as server, sink() as endpoint:
        fill(server.url, 0, 200)
        sidecar = SidecarUnderTest(server.url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        time.sleep(20)  # until it looks for dead runs: not within a lease's time after its start
        for facts_per_second in (0, 500, 800):
            share = share_of_a_core(server.url, sidecar, facts_per_second)
            print(f"metrics and traces, {facts_per_second} facts/s one by one: {share:.2%} of a core")
        sidecar.end()
    alone, longest, series = asyncio.run(scrape_pause())
    print(
        f"a scrape of {series:,} series: {alone * 1000:.0f} ms alone; it held consumption up for at most "
        f"{longest * 1000:.0f} ms, {longest / alone:.2f} of that (goal 1.50)"
    )


if __name__ == "__main__":
    main()
