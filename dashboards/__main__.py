"""Write the boards to `dashboards/json/`; `--check` writes nothing and exits 1 where a committed board differs."""

from __future__ import annotations

import sys
from pathlib import Path

from dashboards import agents, models, runtime

HERE = Path(__file__).parent / "json"
BOARDS = {"agx-agents.json": agents.build, "agx-models.json": models.build, "agx-runtime.json": runtime.build}


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    stale = []
    for name, build in BOARDS.items():
        path, new = HERE / name, build()
        if path.exists() and path.read_text() == new:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(new)
            print(f"wrote {path}")
    if stale and "--check" in arguments:
        print(f"{', '.join(stale)} differ from what the code makes: run `make dashboards`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
