"""Queues, in the background, the facts of a run's earlier attempts that their dead processes did not queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from pydantic_ai.messages import ModelMessage
from redis.exceptions import RedisError

from ..checkpoints.text_size import count_chars
from ..engine.engine import Engine
from ..recovery.dead_run import DeadRun
from ..recovery.missing_facts import find_missing_facts, read_queued_facts
from ..redis import keys
from ..redis.redis_py import Reply
from ..redis.retry import retry
from .state import RunState

logger = logging.getLogger("agx")

_RETRY_PAUSE = 1.0  # seconds after a read that had no answer


class DeadAttempts:
    """Queues the facts that the dead processes of a run did not queue. It never delays the run."""

    def __init__(self, engine: Engine, dead: DeadRun, state: RunState) -> None:
        self._engine = engine
        self._dead = dead
        self._state = state
        self._task: asyncio.Task[None] | None = None
        self._finishing = asyncio.Event()

    @property
    def was_asking(self) -> bool:
        """Whether the last process died during a model request."""
        return self._dead.void is not None

    def queue_facts(self, conversation: Sequence[ModelMessage] | None = None) -> None:
        """Start to queue the facts; a second call has no effect.

        Args:
            conversation: as the interrupted model request sent it, with instructions; its tokens are estimated.
        """
        if self._task is None and not self._dead.has_all_facts:
            sent_chars = None if conversation is None else count_chars(conversation)
            self._task = asyncio.get_running_loop().create_task(self._queue(sent_chars), name="agx-dead")

    async def finish(self) -> None:
        """Wait until the facts are queued. If Redis does not answer now, they are lost, and a warning is logged."""
        self.queue_facts()
        self._finishing.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _queue(self, sent_chars: int | None) -> None:
        engine, dead = self._engine, self._dead
        queue = keys.queue(engine.config.key_prefix, keys.partition(dead.session.scope, engine.queues.partitions or 1))

        async def call(*command: str | int) -> Reply:
            return await retry(lambda: engine.control.execute(*command))

        while True:
            is_last = self._finishing.is_set()
            try:
                queued = await read_queued_facts(call, queue, dead.run_id, dead.record)
                break
            except (RedisError, OSError) as error:
                if is_last:
                    logger.warning(
                        "agx: facts of earlier attempts of run %s are lost, Redis does not answer (%s)",
                        dead.run_id, type(error).__name__,
                    )  # fmt: skip
                    return
            with contextlib.suppress(TimeoutError):  # the run goes on meanwhile
                async with asyncio.timeout(_RETRY_PAUSE):
                    await self._finishing.wait()
        missing = find_missing_facts(dead.session, dead.run_id, dead.record, queued, sent_chars=sent_chars)
        for fact in () if missing is None else missing.facts:
            engine.queues.put(fact, self._state)
