"""Schemathesis finds nothing: no unhandled error, no answer that the OpenAPI does not name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.web import ADA, running_service

# JSON Schema has no word for "the last element is the user's": what breaks that rule is refused with 400.
# A session need not be made: one that was deleted is empty, like one that never was.
_CONFIG = """
[checks]
use_after_free.enabled = false

[[operations]]
include-path-regex = "^/api/(chat|ag-ui)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "409"]
"""


# Of all operations together; `hypothesis` takes the same variable.
_EXAMPLES = int(os.environ.get("AGX_FUZZ_EXAMPLES") or 130)
_OPERATIONS = 24
_TIMEOUT = 280 + _EXAMPLES // 2


@pytest.mark.timeout(_TIMEOUT + 20)
def test_schemathesis_finds_nothing(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(_CONFIG)
    with running_service("chat", tmp_path, redis_url, None) as service:
        command = [Path(sys.executable).with_name("schemathesis"), "--no-color", "run", f"{service.url}/openapi.json"]
        options = [
            f"--header=Authorization: {ADA['Authorization']}",
            f"--max-examples={_EXAMPLES // _OPERATIONS}",
            "--request-timeout=20",
            "--generation-database=:memory:",
        ]
        found = subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
        log = service.log.read_text()
    assert found.returncode == 0, found.stdout
    assert f"Tested: {_OPERATIONS}" in found.stdout, found.stdout
    assert "Traceback" not in log
