"""Whether a run is its process's to tell of: another may have replaced it, or a sidecar finished it as dead."""

from __future__ import annotations

from collections.abc import Callable


class Standing:
    """Where one run stands. A run in another's tool stands and falls with it."""

    def __init__(self, parent: Standing | None) -> None:
        self.ended = False  # its `end` is acknowledged
        self.is_ours: Callable[[], bool] | None = None  # None without a lease
        self._parent = parent
        self._fenced = False
        self._suppressed = False

    def fence(self) -> None:
        """Another has replaced it: it writes and tells nothing more."""
        self._fenced = True

    def keep(self) -> None:
        """Its own `end` is in the stream: that decides, whatever became of its lease."""
        self._fenced = False

    def suppress(self) -> None:
        """Another has told operators how it ended: it tells them nothing more."""
        self._suppressed = True

    @property
    def fenced(self) -> bool:
        """Whether somebody else has finished this run, or the one in whose tool it works."""
        return self._fenced or (self._parent is not None and self._parent.fenced)

    @property
    def suppressed(self) -> bool:
        """Whether somebody else has told how this run ended: then it tells operators nothing more."""
        return self._suppressed or self._fenced or (self._parent is not None and self._parent.suppressed)

    @property
    def confirmed(self) -> bool:
        """Whether nobody else can have finished it by now: its lease has held since it wrote, or it ended.

        Till it is, its facts wait.
        """
        if self.ended or self.is_ours is None:
            return self._parent is None or self._parent.confirmed
        return self.is_ours()
