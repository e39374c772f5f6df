"""`make console-preview`: draws docs/img/console*.png from the demo's own runs, on a real console in a Chromium."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect
from redis.asyncio import Redis

import agx
from agx.demo.finished_runs import FinishedRuns
from agx.demo.scenarios import (
    BRIEFING,
    CANCELLED,
    DECLINED,
    HAIKU,
    KILLED,
    LATE,
    REFUND,
    REPORT,
)
from agx.demo.sidecar import SidecarProcess
from agx.demo.traffic import LEASE_TTL, Traffic
from agx.embedded.server import EmbeddedServer

IMAGES = Path(__file__).parents[2] / "docs" / "img"
_OVER = (HAIKU, DECLINED, REFUND, KILLED, *CANCELLED)
_LIVE = (BRIEFING, REPORT, LATE, REFUND)


async def draw(into: Path) -> None:
    """Play scenes, and take both pages while some are live."""
    with EmbeddedServer() as server:
        sidecar = SidecarProcess(server.url)
        try:
            await sidecar.start(watched=True)
            async with Redis.from_url(server.url) as client, async_playwright() as playwright:
                agx.configure(agx.Config(redis=client, service_name="agx-demo", lease_ttl=LEASE_TTL))
                browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
                page = await browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
                await page.goto(sidecar.console_url)
                await _play(page, server.url, into)
                await browser.close()
                await agx.aclose()
        finally:
            sidecar.stop()


async def _play(page: Page, redis_url: str, into: Path) -> None:
    traffic = Traffic(redis_url, None, FinishedRuns(), on_begin=lambda view: None, on_end=lambda ran: None)
    print("runs that are over when it is drawn ...", flush=True)
    await asyncio.gather(*map(traffic.play, _OVER))
    print("live ones ...", flush=True)
    live = [asyncio.create_task(traffic.play(scenario)) for scenario in _LIVE]
    await expect(page.locator("#h-live")).to_contain_text(str(len(_LIVE)))
    await _take(page, into / "console-runs.png")
    await page.get_by_role("region", name="Live runs").get_by_role("link", name="travel").click()
    # Both tools are done, and the answer is being written.
    await expect(page.get_by_role("region", name="Events")).to_contain_text("take tram", timeout=30_000)
    await _take(page, into / "console.png")
    await asyncio.gather(*live)


async def _take(page: Page, picture: Path) -> None:
    await page.screenshot(path=picture)
    print(f"drew {picture}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(draw(IMAGES))
    except KeyboardInterrupt:
        sys.exit(130)
