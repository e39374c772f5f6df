"""`Lease`: the state of the lease of one run, in the process that holds it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..facts.schema import Reason
from ..redis import keys
from ..redis.redis_py import Reply
from .lease_index import Run


@dataclass(eq=False, slots=True)
class Lease:
    """One run's lease. Its callbacks are synchronous.

    Args:
        on_cancel: called with the reason and the mark's server time in ms, at each renewal that finds the mark.
        on_lost: called when another run holds the session.
        on_retaken: called when the lease was taken again after it had expired, or after a recovery had claimed the
            session: meanwhile the run may have been ended.
        recover: seconds for which another process can resume the run.
        begin_until_ms: the server's time until which the run may begin. No recovery reads the run before.
    """

    session: keys.SessionKeys
    run_id: str
    on_cancel: Callable[[Reason, int | None], None]
    on_lost: Callable[[], None]
    holder: str = ""  # this attempt, in the live key; by default the run id
    confirmed: float = field(default_factory=time.monotonic)  # when the last answered renewal was sent
    taken: float = field(default_factory=time.monotonic)  # when it was last acquired, not only renewed
    breaks: int = 0  # the bus's count of broken connections at that time
    on_retaken: Callable[[], None] = lambda: None
    recover: float = 0.0
    begin_until_ms: int = 0
    index_entry: asyncio.Future[Reply] | None = None  # of its user's index; 1 if the session was not in it
    indexed_at: float = float("-inf")  # monotonic, when the session was last written to the index again

    def __post_init__(self) -> None:
        self.holder = self.holder or self.run_id

    @property
    def run(self) -> Run:
        return self.session, self.run_id
