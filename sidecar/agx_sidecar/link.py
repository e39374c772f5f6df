"""The sidecar's link to Redis: opens the client, logs each outage once, retries, keeps the server's clock.

It also runs one piece of Lua for several keys with one command.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from redis.asyncio import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from agx.redis.address import Client, RedisAddress, open_redis
from agx.redis.retry import Backoff

from .log import RepeatedWarnings, shorten

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What redis-py raises for a cluster without a reachable node is no RedisError.
TROUBLE = (RedisError, RedisClusterException, OSError, TimeoutError)

BLOCK_MS = 1_000  # how long a reader's XREAD waits for news
SOCKET_TIMEOUT = 5.0  # seconds; above BLOCK_MS, or every quiet second would look like an outage
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0  # seconds between two attempts

# BODY is replaced by Lua that returns the reply for one key; it may use `key`, `argument` and `now` (the server's ms).
_FOR_EACH_KEY = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function ask(key, argument) BODY end
local replies = {now}
for n, key in ipairs(KEYS) do
  local ok, reply = pcall(ask, key, ARGV[n])
  if not ok and type(reply) == 'string' then reply = {err = reply} end
  replies[n + 1] = reply or false
end
return replies
"""


def open_client(address: RedisAddress) -> Client:
    """Return a client that connects on first use and never repeats a command by itself."""
    client = open_redis(
        address,
        socket_timeout=SOCKET_TIMEOUT,
        socket_connect_timeout=3.0,
        client_name="agx-sidecar",
        decode_responses=False,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
    )
    # Entries are taken as the server sends them: redis-py would make a dict of each.
    for command in ("XREAD", "XREADGROUP", "XAUTOCLAIM", "XRANGE", "XREVRANGE"):
        client.set_response_callback(command, _as_sent)
    return client


def _as_sent(response: Any, **_: Any) -> Any:
    return response


class Link:
    """One client, shared by all tasks; each command in flight has its own connection."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.up = False
        self.last_reply = float("-inf")  # monotonic
        self.last_error = "it has not answered yet"
        self.steady_since = time.monotonic()  # since when it has answered without a break
        self._down_since: float | None = None
        self.warnings = RepeatedWarnings(logger)
        self._clock_offset = time.time() - time.monotonic()

    async def call(self, *command: Any) -> Any:
        """Send a command once and return the reply; raises what redis-py raises."""
        task = asyncio.current_task()
        cancels = task.cancelling() if task is not None else 0
        try:
            try:
                reply = await self.client.execute_command(*command)
            finally:
                # redis-py sends under asyncio.wait_for(), which before Python 3.12 may swallow a cancellation.
                if task is not None and task.cancelling() > cancels:
                    raise asyncio.CancelledError
        except AttributeError as error:
            # redis-py's cluster client writes to a connection that it has closed meanwhile.
            closed = ConnectionError("the connection was closed")
            self._went_down(closed)
            raise closed from error
        except TROUBLE as error:
            # A refusal is an answer: the server is there.
            if not isinstance(error, ResponseError):
                self._went_down(error)
            raise
        self._answered()
        return reply

    async def call_each(self, body: str, arguments: Mapping[str, str | int]) -> dict[str, Any]:
        """Run a piece of Lua (see `_FOR_EACH_KEY`) for each key with its argument; return the replies by key.

        This is one command, in a cluster one for each key, because there a script may use one key only. If the server
        refuses a command for one key, its reply is a ResponseError, and the other keys have their replies.
        """
        script = _FOR_EACH_KEY.replace("BODY", body)
        groups = [[key] for key in arguments] if isinstance(self.client, RedisCluster) else [list(arguments)]
        replies: dict[str, Any] = {}
        for group in groups:
            now, *of_group = await self.call("EVAL", script, len(group), *group, *(arguments[key] for key in group))
            self.set_clock(int(now))
            replies.update(zip(group, of_group, strict=True))
        return replies

    async def persist(self, doing: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt until Redis executes it; each outage is one line in the log."""
        backoff = Backoff(_FIRST_WAIT, _LONGEST_WAIT, jitter=0.2)
        while True:
            try:
                return await attempt()
            except TROUBLE as error:
                self.report_refusal(doing, error)
            await asyncio.sleep(backoff.next())

    def report_refusal(self, doing: str, error: BaseException) -> None:
        """Log a refusal, at most once a minute; outages are logged by `call`."""
        if isinstance(error, ResponseError):
            self.warnings.warn(f"Redis refused to {doing}: {shorten(str(error))}")

    def set_clock(self, server_ms: int) -> None:
        """Set the server's clock from a reply that carried it."""
        self._clock_offset = server_ms / 1000 - time.monotonic()

    def now_ms(self) -> int:
        """Return the server's time, by the last reply that carried it."""
        return int((time.monotonic() + self._clock_offset) * 1000)

    def _went_down(self, error: BaseException) -> None:
        self.last_error = shorten(error)
        if self._down_since is None:
            self._down_since = time.monotonic()
            logger.warning("Redis can't be reached (%s); trying again until it can", self.last_error)
        self.up = False

    def _answered(self) -> None:
        self.last_reply = time.monotonic()
        self.up = True
        if self._down_since is not None:
            logger.info("Redis answers again after %.1f s", self.last_reply - self._down_since)
            self._down_since = None
            self.steady_since = self.last_reply
