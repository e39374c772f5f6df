"""What a process retains of the streams that it wrote: how much, and for which writer."""

from __future__ import annotations

from dataclasses import dataclass

from agx.redis.supervisor import Supervisor
from agx.stream.entry import StreamEntry
from agx.stream.open_streams import OpenStreams
from agx.stream.stream_tail import Retained

MIB = 1_048_576


@dataclass(eq=False)
class Writer:
    """A writer that counts how often its stream is compared."""

    stream: str = "agx:acme:ada:s"
    buffered: int = 0
    last_put: float = 0.0
    checks: int = 0

    def check(self) -> None:
        self.checks += 1

    def refresh(self) -> None:
        raise AssertionError("too early")

    def retry_now(self) -> None:
        raise AssertionError("nothing waits")

    def forget(self) -> None:
        self.checks = -1_000


def test_checkpoints_count_towards_the_limit_of_retained_bytes() -> None:
    retained = Retained(60)
    retained.add(StreamEntry((n, 0), "event", "pydantic-ai", b"{}", None, b"x" * MIB) for n in range(1, 11))
    assert [entry.id[0] for entry in retained] == [8, 9, 10]


async def test_a_fenced_writer_that_closes_last_takes_no_other_s_entries_along() -> None:
    streams = OpenStreams(Supervisor(), retain=60)
    fenced, current = Writer(), Writer()
    streams.open(fenced)
    streams.open(current)
    streams.close(current, retain=True)
    streams.close(fenced, retain=False)
    streams.check_all()
    assert current.checks == 1
    streams.close_all()
