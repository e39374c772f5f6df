"""The witness: listens to every run that a worker enters, and keeps what it hears."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import orjson

import agx

from .plan import scope_of
from .worker import USER

_LOOK_EVERY = 0.02  # seconds between two looks at the ledgers
_WAIT_FOR_BEGIN = 30.0


@dataclass(slots=True)
class Heard:
    """What one listener heard of one run."""

    session: str
    seqs: list[int] = field(default_factory=list)
    text: str = ""
    run_id: str | None = None
    outcome: str | None = None
    gaps: int = 0  # what the listener was told itself to have missed
    unended: bool = False  # the listener gave the run up: nobody had closed it
    ended_at: float | None = None  # monotonic, when its listener was freed
    noted: list[str] = field(default_factory=list)  # what its worker wrote down
    task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        return self.run_id is not None

    @property
    def hangs(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def worker(self) -> str:
        return self.session.split("-")[0]

    @property
    def lost(self) -> int:
        """How many events it missed."""
        return len(set(range(max(self.seqs, default=-1) + 1)) - set(self.seqs)) + self.gaps

    @property
    def repeated(self) -> int:
        return len(self.seqs) - len(set(self.seqs))


class Witness:
    """Follows the ledgers of all workers of a scene, which stand in `directory`; agx is configured by its maker."""

    def __init__(self, directory: Path) -> None:
        self.heard: dict[str, Heard] = {}
        self.left: set[Path] = set()  # ledgers whose worker ended by itself
        self.directory = directory
        self._read: dict[Path, int] = {}
        self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            self._read_ledgers()
            await asyncio.sleep(_LOOK_EVERY)

    def _read_ledgers(self) -> None:
        for path in self.directory.glob("*.ledger"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._note(path, orjson.loads(line))

    def _note(self, path: Path, line: dict[str, str]) -> None:
        session, event = line["session"], line["event"]
        if event == "left":
            self.left.add(path)
        elif event == "entered":
            heard = self.heard[session] = Heard(session)
            heard.task = asyncio.create_task(self._listen(heard))
        else:
            self.heard[session].noted.append(f"{event} {line['what']}".strip())

    async def _listen(self, heard: Heard) -> None:
        scope = scope_of(heard.session)
        async for event in agx.listen(scope, USER, heard.session, wait=_WAIT_FOR_BEGIN, timeout=120, serialize=False):
            body = event["body"]
            if "seq" in body:
                heard.seqs.append(body["seq"])
            if event["type"] == "begin":
                heard.run_id = body["run_id"]
            elif event["type"] == "end":
                heard.outcome = body["outcome"]
            elif body.get("error_type") == "lost" and "seq" not in body:
                # The listener's own word, where no sidecar could close the run in time; one does so later.
                heard.outcome = "lost"
            elif body.get("gap"):
                heard.gaps += 1
            elif body.get("part_kind") == "text":
                heard.text += body.get("content_delta") or body.get("content", "")
        heard.unended = heard.begun and heard.outcome is None
        heard.ended_at = time.monotonic()

    def live(self) -> list[Heard]:
        """Return the runs that have begun and whose end was not heard."""
        return [heard for heard in self.heard.values() if heard.begun and heard.hangs]

    async def settle(self, seconds: float) -> None:
        """Wait until every listener whose run began has heard its end, at most so long; then stop."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while loop.time() < deadline:
            self._read_ledgers()
            if not any(heard.hangs and (heard.begun or not heard.noted) for heard in self.heard.values()):
                break
            await asyncio.sleep(_LOOK_EVERY)

    async def stop(self) -> None:
        """Stop listening, whoever hangs."""
        tasks = [self._looking, *(heard.task for heard in self.heard.values() if heard.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
