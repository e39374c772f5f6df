"""The hub: all listeners of a loop share one subscription connection and one reading connection.

A session with listeners has one `Feed`. A wake-up has the new entries, or causes the feed to read them once. The feed
hands them to all its listeners. If the writer sends no wake-ups, the feed reads the stream once a second. Source:
contract, section 4; field notes, section 8.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..redis import keys
from ..redis.bus import Bus
from ..redis.entry_id import StreamId, format_id
from ..redis.recovery_window import parse_recover
from ..redis.redis_py import Reply
from ..redis.supervisor import Supervisor
from .append_scripts import read_wake_up
from .entry import StreamEntry
from .subscription import Subscription

READ = 500  # entries a read
QUEUE = 2_000  # entries a listener may lag behind before it reads from its own cursor again
_NEVER = float("inf")
POLL = 1.0  # seconds between two polls of quiet sessions


class Subscriber:
    """A listener in a feed: the entries that the feed has handed to it and that it has not taken yet."""

    __slots__ = ("_timer", "_until", "_waiter", "caught_up", "entries", "waits_for_run")

    def __init__(self) -> None:
        self.entries: list[StreamEntry] = []
        self.caught_up = False  # the feed hands entries to it; otherwise it reads from its own cursor
        self.waits_for_run = False  # its listener has read the end of a run, and follows the session's next one
        self._waiter: asyncio.Future[list[StreamEntry] | None] | None = None
        self._until = _NEVER
        self._timer: asyncio.TimerHandle | None = None

    def take(self) -> list[StreamEntry]:
        """Return the entries that were handed over, and forget them."""
        entries, self.entries = self.entries, []
        return entries

    def hand_over(self, entries: list[StreamEntry]) -> bool:
        """Give entries to the listener, which must not change the list; return False if too many wait for it."""
        if not self.deliver(entries):
            self.entries.extend(entries)
        return len(self.entries) <= QUEUE

    def wait(self, until: float) -> asyncio.Future[list[StreamEntry] | None]:
        """Return a future of the next entries. Its result is None if there are none until then (the loop's time)."""
        loop = asyncio.get_running_loop()
        self._until = until
        if until != _NEVER and (self._timer is None or until < self._timer.when()):
            self.close()
            self._timer = loop.call_at(until, self._expire)
        self._waiter = loop.create_future()
        return self._waiter

    def deliver(self, entries: list[StreamEntry] | None) -> bool:
        """Complete the wait of the listener with this result; return False if it does not wait."""
        if self._waiter is None or self._waiter.done():
            return False
        self._waiter.set_result(entries)
        return True

    def _expire(self) -> None:
        # One timer serves many waits: each wait only moves the time at which it has to fire.
        self._timer = None
        if self._waiter is None or self._waiter.done() or self._until == _NEVER:
            return
        loop = asyncio.get_running_loop()
        if self._until > loop.time():
            self._timer = loop.call_at(self._until, self._expire)
        else:
            self._waiter.set_result(None)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()


class Feed:
    """The new entries of one session's stream, read once for all its listeners."""

    def __init__(self, bus: Bus, session: keys.SessionKeys, patience: float, on_overflow: Callable[[], None]) -> None:
        self.stream = session.stream
        self.dead = False  # its run has died, and nobody has ended or resumed it in time
        self.cursor: StreamId | None = None  # of the last entry that was handed out
        self.subscribers: set[Subscriber] = set()
        self.quiet = False  # no wake-up since the last poll
        self.early_wake_ups = 0  # that were received while there was no cursor
        self._is_announced = False  # the writer sends wake-ups: no poll has found what had none
        self._is_polling = False  # the read that is under way was caused by a poll
        self._polled_at = time.monotonic()
        self._bus = bus
        self._live = session.live
        self._patience = patience
        self._dead_since: float | None = None
        self._judged_at = 0.0  # when Redis last answered whether the run is live (monotonic)
        self._recover = 0.0  # seconds for which another process can resume the run
        self._on_overflow = on_overflow
        self._reading = False
        self._again = False

    def on_wake_up(self, message: bytes) -> None:
        """Handle a wake-up: the writer has appended. Read the stream only if entries may be missing here."""
        self.quiet = False
        self._is_announced, self._is_polling = True, False
        if self.cursor is None or self._reading or (appended := read_wake_up(message)) is None:
            self.read_soon()
            return
        before, entries = appended
        if before == self.cursor:
            self._distribute(entries)
        elif entries[-1].id > self.cursor:
            self.read_soon()

    def needs_poll(self, interval: float) -> bool:
        """Return whether a quiet feed must poll now; if its writer sends wake-ups, every `interval` seconds is enough.

        On one server a wake-up is lost only with the connection, and each new connection reads what was missed. The
        interval is also enough where all listeners wait for a run to begin, because there may be many such feeds.
        """
        is_quiet = self._is_announced and self._dead_since is None
        can_wait = is_quiet or all(subscriber.waits_for_run for subscriber in self.subscribers)
        can_wait = can_wait and self._bus.delivers_messages
        return not can_wait or time.monotonic() - self._polled_at >= interval

    def poll(self) -> None:
        """Read new entries that had no wake-up, and whether the run is still live: once for all listeners."""
        self._polled_at = time.monotonic()
        self._is_polling = True
        self.read_soon()
        self._bus.execute("GET", self._live).add_done_callback(self._judge)

    def _judge(self, live: asyncio.Future[Reply]) -> None:
        now, before = time.monotonic(), self._judged_at
        self._judged_at = now
        if live.exception() is not None or live.result() is not None:  # an outage shows nothing about the run
            self._revive()
        elif self._dead_since is None:
            self._dead_since = now
            self._bus.execute("XRANGE", self.stream, "-", "+", "COUNT", 1).add_done_callback(self._read_begin)
        else:
            # While this process was stopped, its own runs could not take their leases again.
            self._dead_since += max(0.0, now - before - 2 * POLL)
            if not self.dead and now - self._dead_since > self._patience + self._recover:
                self.dead = True
                for subscriber in self.subscribers:
                    subscriber.deliver([])

    def _read_begin(self, first: asyncio.Future[Reply]) -> None:
        if first.exception() is not None:
            self._revive()  # asked again with the next poll
        elif entries := first.result():
            self._recover = parse_recover(StreamEntry.of(*entries[0]).body) or 0.0

    def _revive(self) -> None:
        self.dead, self._dead_since, self._recover = False, None, 0.0

    def read_soon(self) -> None:
        """Read new entries soon."""
        if self.cursor is None:
            self.early_wake_ups += 1  # all listeners still read from their own cursors
            return
        if self._reading:
            self._again = True
            return
        self._reading, self._again = True, False
        read = self._bus.execute("XRANGE", self.stream, f"({format_id(self.cursor)}", "+", "COUNT", READ)
        read.add_done_callback(self._hand_out)

    def go_back(self, last: StreamId) -> None:
        """Read on after the stream's last entry: later ones that were handed out are lost or have expired."""
        if not self._reading and self.cursor is not None and last < self.cursor:
            self.cursor = last
            self.read_soon()

    def _hand_out(self, read: asyncio.Future[Reply]) -> None:
        self._reading = False
        if read.exception() is not None:
            self._is_announced = False  # then the next poll reads it
            return
        entries = [StreamEntry.of(*entry) for entry in read.result()]
        if entries:
            self._is_announced = self._is_announced and not self._is_polling
            self._distribute(entries)
        if self._again or len(entries) == READ:
            self.read_soon()

    def _distribute(self, entries: list[StreamEntry]) -> None:
        self.cursor = entries[-1].id
        self._revive()
        for subscriber in self.subscribers:
            if subscriber.caught_up and not subscriber.hand_over(entries):
                # Nothing is skipped: it reads from its own cursor, at its own pace.
                subscriber.caught_up = False
                self._on_overflow()


class Hub:
    """The feeds of a loop."""

    def __init__(
        self, bus: Bus, subscription: Subscription, supervisor: Supervisor, *, patience: float, poll_every: float
    ) -> None:
        self.bus = bus
        self.gaps = self.rereads = self.listeners = 0
        self._subscription = subscription
        self._supervisor = supervisor
        self._patience = patience  # seconds that a run without a lease has to be closed by a sidecar
        self._poll_every = poll_every  # seconds between two polls of a quiet session whose writer sends wake-ups
        self._feeds: dict[str, Feed] = {}
        self._polling: asyncio.Task[None] | None = None

    def join(self, session: keys.SessionKeys) -> tuple[Feed, Subscriber]:
        """Add a listener to the feed of a session; the cost does not depend on the number of listeners."""
        feed = self._feeds.get(session.stream)
        if feed is None:
            feed = self._feeds[session.stream] = Feed(self.bus, session, self._patience, self._count_reread)
            self._subscription.subscribe(session.wake_channel, feed.on_wake_up, feed.read_soon)
        if self._polling is None:
            self._polling = self._supervisor.start(self._poll, name="agx-hub-poll")
        subscriber = Subscriber()
        feed.subscribers.add(subscriber)
        self.listeners += 1
        return feed, subscriber

    def leave(self, session: keys.SessionKeys, feed: Feed, subscriber: Subscriber) -> None:
        """Remove a listener; the last one ends the feed. Synchronous, so that a cancelled listener leaks nothing."""
        feed.subscribers.discard(subscriber)
        subscriber.close()
        self.listeners -= 1
        if not feed.subscribers and self._feeds.get(session.stream) is feed:
            del self._feeds[session.stream]
            self._subscription.unsubscribe(session.wake_channel)

    def _count_reread(self) -> None:
        self.rereads += 1

    async def _poll(self) -> None:
        """Poll quiet sessions: their writer may send no wake-ups, or be dead."""
        while True:
            await asyncio.sleep(POLL)
            self._poll_quiet()

    def _poll_quiet(self) -> None:
        for feed in list(self._feeds.values()):
            if feed.quiet and feed.needs_poll(self._poll_every):
                feed.poll()
            feed.quiet = True

    async def aclose(self) -> None:
        """Stop the task."""
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
