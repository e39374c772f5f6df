"""The commands `agx` and `agx-sidecar`: Ctrl-C ends them without a traceback, also while they are being loaded."""

from importlib import import_module


def agx() -> int:
    """Run `agx` and return its exit code."""
    return _run("agx.cli")


def sidecar() -> int:
    """Run `agx-sidecar` and return its exit code."""
    return _run("agx_sidecar.__main__")


def _run(module: str) -> int:
    try:
        return int(import_module(module).main() or 0)
    except KeyboardInterrupt:
        return 130
