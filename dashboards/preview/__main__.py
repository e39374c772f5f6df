"""Draw the committed boards from live demo data into PNGs: `python -m dashboards.preview [--seconds N] [--into DIR]`.

No Grafana is involved: each panel's own queries are run on a real Prometheus and plotted at the panel's own place. With
`--grafana` the boards are drawn with Grafana's own components, too (needs npm and chromium).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from dashboards.preview.draw import Window, draw
from dashboards.preview.stack import ROOT, Stack, StackError, running
from dashboards.preview.traffic import Traffic

BOARDS = ROOT / "dashboards" / "json"
TICK = 0.5  # seconds
PRINT_EVERY = 15.0  # seconds


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dashboards.preview", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="how long to let traffic flow (default 150)")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "boards", help="directory of the pictures")
    parser.add_argument("--grafana", action="store_true", help="draw with Grafana's own components, too")
    options = parser.parse_args()
    print("starting Prometheus and two sidecars ...", flush=True)
    try:
        with running() as stack:
            window = _flow(stack, options.seconds)
            options.into.mkdir(parents=True, exist_ok=True)
            boards = {path.stem: json.loads(path.read_text()) for path in sorted(BOARDS.glob("*.json"))}
            for name, board in boards.items():
                picture = options.into / f"{name}.png"
                draw(board, stack, window, picture)
                print(f"drew {picture}")
            if options.grafana:
                from dashboards.preview.grafana import draw_boards  # noqa: PLC0415 - it needs a browser

                draw_boards(boards, stack, window, options.into)
    except StackError as error:
        print(f"dashboards.preview: {error}", file=sys.stderr)
        return 1
    return 0


def _flow(stack: Stack, seconds: float) -> Window:
    """Let traffic flow and print progress; return the time to show."""
    traffic = Traffic(stack.redis_url)
    start = time.time()
    printed = start
    print(f"traffic for {seconds:.0f} s ...", flush=True)
    while (now := time.time()) < start + seconds:
        if now > printed + PRINT_EVERY:
            printed = now
            print(f"  {start + seconds - now:.0f} s to go", flush=True)
        traffic.tick()
        time.sleep(TICK)
    traffic.close()
    # The first seconds have no rates yet.
    return Window(start + 15, time.time())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
