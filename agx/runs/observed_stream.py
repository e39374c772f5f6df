"""An event stream of pydantic-ai's that a run's recorder sees pass."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from pydantic_ai.messages import AgentStreamEvent

from .recording.recorder import Recorder


class ObservedStream(AsyncIterator[AgentStreamEvent]):
    """Gives each event to a recorder and passes it on; half the cost of a generator, on the token path.

    Whatever recording an event raises, the run goes on. A run that another process can go on with fails instead: one of
    its checkpoints would be missing.
    """

    def __init__(self, stream: AsyncIterable[AgentStreamEvent], recorder: Recorder) -> None:
        self._stream = stream
        self._next = aiter(stream).__anext__
        self._on_event = recorder.on_event
        self._recorder = recorder

    async def __anext__(self) -> AgentStreamEvent:
        event = await self._next()
        try:
            self._on_event(event)
        except Exception as error:
            if self._recorder.journal is not None:
                raise
            self._recorder.engine.supervisor.note(error, "agx-recorder")
        return event

    async def aclose(self) -> None:
        """Close the stream, where it can be closed."""
        if isinstance(self._stream, AsyncGenerator):
            await self._stream.aclose()
