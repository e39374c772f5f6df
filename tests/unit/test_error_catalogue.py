"""The error catalogue: its page is what the code has, and no text of an exception is in what end users read."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic_ai.exceptions import ContentFilterError, ModelHTTPError, UnexpectedModelBehavior, UsageLimitExceeded

import agx
from agx import error_codes as errors
from agx.runs.outcome import classify_error

PAGE = Path("docs/reference/errors.md")


def test_the_page_has_the_rows_of_the_code() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{row.code}` | {row.http_status or 'event'} | {row.sentence} | {row.cause} | {row.action} |"
        for row in errors.CATALOGUE
    ]


def test_every_code_of_the_module_is_in_the_catalogue_once() -> None:
    defined = [value for value in vars(errors).values() if isinstance(value, errors.ErrorCode)]
    assert list(errors.CATALOGUE) == defined
    assert len({row.code for row in defined}) == len(defined)


def test_every_code_of_the_client_is_in_the_catalogue_or_on_its_page() -> None:
    client = files("agx.client").joinpath("agx.js").read_text()
    sentences = client.partition("const SENTENCES = {")[2].partition("\n};")[0]
    compared = re.findall(r"""(?:code [!=]==|AgxError\() ?"(\w+)\"""", client)
    codes = {"network_error", *compared, *re.findall(r"^  (\w+): ", sentences, re.MULTILINE)}
    assert len(codes) > 8
    documented = set(re.findall(r"`(\w+)`", Path("docs/how-to/page.md").read_text().partition("## Errors")[2]))
    assert codes - documented - {row.code for row in errors.CATALOGUE} == set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("secret"), "run_failed"),
        (ModelHTTPError(429, "m", {"error": "secret"}), "model_failed"),
        (UnexpectedModelBehavior("secret"), "model_answer_unusable"),
        (ContentFilterError("secret"), "content_refused"),
        (UsageLimitExceeded("secret"), "limit_reached"),
        (TimeoutError("secret"), "run_timed_out"),
        (agx.SessionBusyError("secret"), "session_busy"),
        (agx.SessionUnknownError("secret"), "session_unknown"),
        (agx.SessionConflictError("secret"), "conversation_changed"),
        (agx.BranchError("secret"), "conversation_changed"),
        (agx.QueueFullError("secret", "2 jobs"), "queue_full"),
        (agx.RedisUnavailableError("secret", "secret"), "redis_unavailable"),
    ],
)
def test_an_exception_has_a_code_by_its_type(error: BaseException, code: str) -> None:
    row = classify_error(error)
    assert row.code == code
    assert "secret" not in row.sentence
