"""The sidecar's log: an exception without its text, which may quote content; any text fits into a line of JSON."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from redis.exceptions import ResponseError

from agx_sidecar.log import JsonLines, Lines


def record_of(error: Exception, message: str = "it failed") -> logging.LogRecord:
    try:
        raise error
    except Exception:
        return logging.LogRecord("agx_sidecar", logging.ERROR, __file__, 1, message, (), sys.exc_info())


@pytest.mark.parametrize("formatter", [Lines("%(message)s"), JsonLines()], ids=["text", "json"])
def test_an_exception_has_its_place_and_its_type_and_only_a_servers_text(formatter: logging.Formatter) -> None:
    text = formatter.format(record_of(ValueError("what the user asked")))
    assert "what the user asked" not in text
    assert "ValueError" in text
    assert "in record_of" in text
    assert "WRONGTYPE" in formatter.format(record_of(ResponseError("WRONGTYPE Operation against a key")))


def test_any_text_fits_into_a_line() -> None:
    line = JsonLines().format(record_of(ValueError(), "bad\ud83d"))
    assert json.loads(line)["message"] == "bad\ud83d"
    assert "\n" not in line
