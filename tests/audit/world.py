"""A leader and a standby on a real server, and a real Prometheus that scrapes them twice; leaders die and stall."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from redis import Redis
from support.replica import PARTITIONS, Queue, Replica
from support.rigs import paused
from support.waiting import wait_until_sync

from agx.embedded.server import EmbeddedServer
from dashboards.preview.stack import Stack, StackError, deployed_config, start_prometheus

PLAIN, RELABELLED = "plain", "relabelled"  # the two scrape jobs
_PATIENCE = 60.0  # seconds, for a machine that has other things to do


class World:
    """What the audit works on."""

    def __init__(self, home: Path, server: EmbeddedServer, queue: Queue, prometheus: Callable[[Path], str]) -> None:
        self.url = server.url
        self.queue = queue
        self.replicas: list[Replica] = []
        self.stalls: list[str] = []  # what a leader said that had stalled, and should have said nothing
        self._home = home
        self._targets = home / "targets.json"
        self._names: dict[Replica, str] = {}
        for _ in range(2):
            self._start_replica()
        self.stack = Stack(server.url, (), prometheus(self._targets))
        self.began = time.time()
        self._wait_for_scrapes(self.leader())

    def leader(self) -> Replica:
        """Wait for a replica that leads, and return it."""
        return self._leader_of(self.replicas)

    def kill_leader(self) -> None:
        """SIGKILL the leader, wait until Prometheus has the standby's series, and start another standby."""
        leader = self.leader()
        leader.end(signal.SIGKILL)
        self.replicas.remove(leader)
        self._wait_for_scrapes(self.leader())
        self._start_replica()

    def stall_leader(self) -> None:
        """SIGSTOP the leader until Prometheus has a successor's series, and see that it is none when it wakes up."""
        leader = self.leader()
        others = [each for each in self.replicas if each is not leader]
        with paused(leader.child.pid):
            successor = self._leader_of(others)
            self._wait_for_scrapes(successor)
        scrape = wait_until_sync(leader.scrape, _PATIENCE, what="the leader that had stalled answers")
        if scrape.fleet() and successor.leads():
            self.stalls.append("a leader that had stalled shows the fleet's series beside its successor")

    def _leader_of(self, replicas: list[Replica]) -> Replica:
        return wait_until_sync(
            lambda: next((each for each in replicas if each.leads()), None), _PATIENCE, what="a replica leads"
        )

    def _start_replica(self) -> None:
        name = f"replica-{len(self._names)}"
        replica = Replica(self._home / name, self.url)
        self._names[replica] = name
        self.replicas.append(replica)
        # As a service discovery would: who is gone is no target, and every replica has its own labels.
        targets = [
            {"targets": [f"127.0.0.1:{each.port}"], "labels": {"pod": self._names[each], "container": "sidecar"}}
            for each in self.replicas
        ]
        written = self._targets.with_suffix(".new")
        written.write_text(json.dumps(targets))
        os.replace(written, self._targets)

    def _wait_for_scrapes(self, leader: Replica) -> None:
        """Until both jobs have seen it lead; only then may the next fault hide what this one did."""
        pod = self._names[leader]
        leads = f'agx_sidecar_leader{{pod="{pod}"}} == 1'
        trims = "agx_queue_trimmed_total"
        fleet = f'count by (job) ({trims}{{job="{RELABELLED}"}} or {trims}{{pod="{pod}"}})'

        def scraped() -> bool:
            try:
                return all(len(self.stack.query(expr)) == 2 for expr in (leads, fleet))
            except httpx.HTTPError:
                return False

        wait_until_sync(scraped, _PATIENCE, what=f"scrapes of {pod} as the leader")


@contextmanager
def running(home: Path, scrape: float) -> Iterator[World]:
    """Start everything; Prometheus scrapes each replica twice every `scrape` seconds.

    Raises:
        StackError: there is no `prometheus` on the PATH, or it does not come up.
    """
    with ExitStack() as cleanup:
        server = cleanup.enter_context(EmbeddedServer())
        queue = Queue(cleanup.enter_context(Redis.from_url(server.url)), PARTITIONS)
        world = World(home, server, queue, lambda targets: _start_prometheus(cleanup, home, targets, scrape))
        try:
            yield world
        finally:
            for replica in world.replicas:
                replica.end()


def _start_prometheus(cleanup: ExitStack, home: Path, targets: Path, scrape: float) -> str:
    config = deployed_config(scrape)
    (deployed,) = config["scrape_configs"]
    deployed |= {"job_name": RELABELLED, "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]}
    plain = {key: value for key, value in deployed.items() if key != "metric_relabel_configs"}
    if plain == deployed:
        raise StackError("the deployed scrape configuration has no relabelling: there is nothing to compare")
    config["scrape_configs"] = [deployed, plain | {"job_name": PLAIN}]
    return start_prometheus(cleanup, home, config)
