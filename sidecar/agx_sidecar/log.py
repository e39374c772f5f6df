"""Sets logging up as text or as JSON lines, the latter with `run_id` and `trace_id` where a record has them.

What a server sent is shortened before it is logged, and a warning that would repeat is logged once a minute. An
exception is logged without its text, unless that is a server's: it may quote a stream or a fact.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from typing import Any

from redis.exceptions import RedisError

_EXTRAS = ("run_id", "trace_id")
_MAX_TEXT = 300  # characters of a text from outside
_REPEAT_AFTER = 60.0  # seconds before the same warning is logged again


class Lines(logging.Formatter):
    """One record per line, after it the frames of its exception."""

    def formatException(self, ei: Any) -> str:
        """Return where an exception was raised, and its type."""
        _, error, trace = ei
        text = shorten(error) if isinstance(error, (RedisError, OSError)) else type(error).__name__
        return "".join(traceback.format_tb(trace)) + text


class JsonLines(Lines):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _EXTRAS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str, form: str) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def shorten(text: object) -> str:
    """Return a text from outside for a log, of bounded length; an exception with its type."""
    if isinstance(text, BaseException):
        text = f"{type(text).__name__}: {text}"
    line = " ".join(str(text).split())
    return line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]}..."


class RepeatedWarnings:
    """Logs each warning at most once a minute, however often it is given."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._logged: dict[str, float] = {}  # text -> when, monotonic

    def warn(self, text: str) -> None:
        now = time.monotonic()
        if now - self._logged.get(text, float("-inf")) >= _REPEAT_AFTER:
            self._logged = {each: at for each, at in self._logged.items() if now - at < _REPEAT_AFTER}
            self._logged[text] = now
            self._logger.warning("%s", text)
