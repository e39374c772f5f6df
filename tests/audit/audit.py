"""Plays the runs while leaders are killed, replaced and paused, then compares Prometheus with the ledger."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .ledger import Ledger
from .made_runs import Generator
from .real_runs import Seen, contradictions, play, read_queues
from .verdict import Verdict, judge
from .world import World, running

_REAL = 10  # every tenth run is a real one


@dataclass(frozen=True, slots=True)
class Report:
    """What was played, and what was found."""

    made: int
    real: int
    entries: int  # of the queues
    repeats: int
    samples: int
    below_zero: dict[str, int]  # observations that were, per metric
    verdict: Verdict


def audit(home: Path, *, runs: int, seed: int, scrape: float, pause: float) -> Report:
    """Play `runs`, a tenth of them real, `pause` seconds after each, and scrape every `scrape` seconds.

    Raises:
        StackError: there is no `prometheus` on the PATH, or it does not come up.
        AssertionError: nobody leads, or Prometheus sees nobody lead, in time.
    """
    ledger = Ledger()
    with running(home, scrape) as world:
        generator = Generator(world.queue, ledger, seed)
        seen = _play_through_faults(world, generator, runs, pause)
        print("  comparing the ledger with Prometheus ...", flush=True)
        told = read_queues(world.url)
        for fact in told:  # the generator's own are known; the rest is what the runtime told of real runs
            ledger.note(fact)
        verdict = judge(ledger, world.stack, world.began)
        verdict.broken += contradictions(seen, told) + world.stalls
    samples = sum(row.samples for row in verdict.rows)
    made, below_zero = runs - len(seen), dict(ledger.below_zero)
    return Report(made, len(seen), len(told), generator.repeats, samples, below_zero, verdict)


def _play_through_faults(world: World, generator: Generator, runs: int, pause: float) -> list[Seen]:
    """Play a quarter of the runs during each fault, and the last after them."""
    seen: list[Seen] = []
    bounds = [runs * n // 4 for n in range(5)]
    with ThreadPoolExecutor(2) as pool:
        for first, last, what, strike in zip(
            bounds,
            bounds[1:],
            ("a leader is killed", "a leader is stalled", "a leader is killed", "nothing happens"),
            (world.kill_leader, world.stall_leader, world.kill_leader, None),
            strict=False,
        ):
            print(f"  runs {first + 1} to {last}: {what} ...", flush=True)
            numbers = range(first, last)
            made = pool.submit(generator.feed, [n for n in numbers if n % _REAL], pause)
            real = pool.submit(play, world.url, [n // _REAL for n in numbers if n % _REAL == 0])
            if strike is not None:
                strike()
            made.result()
            seen += real.result()
    return seen
