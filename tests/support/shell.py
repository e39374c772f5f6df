"""The shell blocks of the documentation, run as they stand there, in an environment where they harm nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .docs import ROOT

# What these lines would change is only said: pip finds everything installed, and make names its commands. The package
# is not on an index that a test could rely on, and a demo does not end by itself.
_DRY = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "MAKEFLAGS": "n"}

# So that a page's commands are those of the environment that the tests run in.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run_block(script: str) -> str:
    """Run a block to its end; return what it said. pip and make only say what they would do.

    A warning fails it too: of an extra that does not exist pip says no more than that.
    """
    environment = {**os.environ, **_DRY, "PATH": PATH}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    assert "WARNING" not in done.stderr, f"{script}\n{done.stderr}"
    return done.stdout


def serve(line: str) -> list[str]:
    """Return the command of a page's line that serves until it is stopped, as a child that signals reach."""
    return ["bash", "-euc", f"exec env {line}"]
