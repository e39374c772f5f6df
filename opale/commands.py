"""The commands `agx` and `agx-sidecar`: loading takes a second, in which Ctrl-C has to be as quiet as later."""

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
