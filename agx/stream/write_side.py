"""The write side of a loop: what the writers of all its sessions share."""

from __future__ import annotations

from dataclasses import dataclass

from ..redis.bus import Bus
from ..redis.clock import ServerClock
from ..redis.supervisor import Supervisor
from .group_commit import GroupCommit
from .open_streams import OpenStreams


@dataclass(frozen=True, slots=True)
class AppendSettings:
    """The configuration of appends."""

    max_length: int  # entries of a stream, approximately
    max_body: int  # bytes
    retain: float  # seconds for which acknowledged entries are retained


class WriteSide:
    """The connection for appends, the server's clock, the settings, the group commit and the open streams of a loop."""

    def __init__(self, bus: Bus, clock: ServerClock, supervisor: Supervisor, settings: AppendSettings) -> None:
        self.bus = bus
        self.clock = clock
        self.settings = settings
        self.commit = GroupCommit(supervisor)
        self.streams = OpenStreams(supervisor, retain=settings.retain)

    def close(self) -> None:
        """Stop all timers and writers; events that were not sent are lost with the loop."""
        self.commit.close()
        self.streams.close_all()
