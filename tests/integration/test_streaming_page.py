"""docs/how-to/streaming.md: its block prints what the page shows."""

from __future__ import annotations

from typing import Any

import pytest
from support.docs import every_block


async def test_every_block(redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AGX_REDIS_URL", redis_url)
    with every_block("docs/how-to/streaming.md") as page:
        names: dict[str, Any] = {"__name__": "tokens"}
        exec(compile(page.take("python"), "tokens.py", "exec"), names)
        await names["main"]()
        assert capsys.readouterr().out == page.take("text")
