"""Leaders killed and paused at random while facts come, some twice: counters exact, and never falling."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.made_facts import T0, ended, node, started, tool
from support.replica import Queue, Replica, StartReplica
from support.waiting import wait_until_sync

from agx.facts.schema import Fact

RUNS = 1_200
TAKEOVERS = 5


class Ledger:
    """What really happened."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs = 0
        self.duration_ns = 0

    def a_run(self, n: int, rng: random.Random) -> list[Fact]:
        scope, duration = {"scope": f"scope-{n % 7}"}, rng.randrange(10**11)
        with self.lock:
            self.runs += 1
            self.duration_ns += duration
        run_id = f"run-{n}"
        return [
            started(run_id, **scope),
            node(run_id, **scope),
            tool(run_id, **scope),
            ended(run_id, end_ns=T0 + duration, **scope),
        ]


class Feeder(threading.Thread):
    """Queues runs, and one in twenty facts a second time."""

    def __init__(self, queue: Queue, ledger: Ledger, seed: int) -> None:
        super().__init__(name="feeder")
        self._queue, self._ledger, self._rng = queue, ledger, random.Random(seed)
        self._go = threading.Event()

    def run(self) -> None:
        sent: list[Fact] = []
        for n in range(RUNS):
            facts = self._ledger.a_run(n, self._rng)
            sent += facts
            self._queue.add(*facts, *(self._rng.sample(sent, 1) if n % 5 == 0 else ()))
            self._go.wait(0.01)


@contextmanager
def watching(replicas: list[Replica], ledger: Ledger, faults: list[str]) -> Iterator[None]:
    """Scrape all the time: what a leader shows must never be above the truth, nor below what was shown before."""
    over = threading.Event()

    def watch() -> None:
        highest: dict[object, float] = {}
        while not over.wait(0.02):
            for replica in [each for each in replicas if each.alive]:
                status, body = replica.get("/metrics")
                if status != 200 or "agx_sidecar_leader 1.0" not in body:
                    continue
                for line in body.splitlines():
                    name, _, value = line.rpartition(" ")
                    if line.startswith(("agx_runs_total", "agx_run_duration_seconds_sum", "agx_tokens_total")):
                        if float(value) < highest.get(name, 0.0):
                            faults.append(f"{name} fell from {highest[name]} to {value}")
                        highest[name] = float(value)
                with ledger.lock:
                    truth = ledger.runs
                shown = sum(value for name, value in highest.items() if str(name).startswith("agx_runs_total"))
                if shown > truth:
                    faults.append(f"{shown} runs shown of {truth}")

    thread = threading.Thread(target=watch, name="watch")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(300)
def test_counters_are_exact_through_kills_and_pauses(queue: Queue, start_replica: StartReplica) -> None:
    seed = 20_261_122
    ledger, faults = Ledger(), list[str]()
    replicas = [start_replica() for _ in range(3)]
    feeder = Feeder(queue, ledger, seed)
    feeder.start()
    with watching(replicas, ledger, faults):
        for n in range(TAKEOVERS):
            leader = wait_until_sync(lambda: next((each for each in replicas if each.alive and each.leads()), None))
            assert leader is not None
            wait_until_sync(lambda leader=leader: leader.scrape().total("agx_runs_total") > 0)
            if n % 2:
                os.kill(leader.child.pid, signal.SIGSTOP)
                others = [each for each in replicas if each.alive and each is not leader]
                wait_until_sync(lambda others=others: any(each.leads() for each in others))
                os.kill(leader.child.pid, signal.SIGCONT)
            else:
                leader.end(signal.SIGKILL)
                replicas.append(start_replica())
        feeder.join()
        wait_until_sync(
            lambda: any(each.scrape().total("agx_runs_total") == RUNS for each in replicas if each.alive),
            what="all runs counted",
        )
    assert faults == []
    leader = next(each for each in replicas if each.alive and each.leads())
    seen = leader.scrape()
    assert seen.total("agx_runs_started_total") == RUNS
    assert seen.total("agx_tool_calls_total") == RUNS
    assert seen.total("agx_tokens_total") == RUNS * 1_200
    assert seen.total("agx_run_duration_seconds_sum") == ledger.duration_ns / 1_000_000_000
    assert seen.total("agx_run_duration_seconds_count") == RUNS
    assert seen.total("agx_queue_trimmed_total") == 0
