"""The command `agx-sidecar`: everything is set in the environment (contract, section 7)."""

from __future__ import annotations

import argparse
import os
import sys

from agx import __version__

from .app import run
from .log import set_up_logging
from .settings import SettingsError, read_settings

_EXAMPLES = """examples:
  AGX_REDIS_URL=redis://localhost:6379 agx-sidecar
      counts the metrics, at http://127.0.0.1:9464/metrics
  OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 agx-sidecar
      exports traces too
  AGX_CONSOLE=full AGX_SINKS=none agx-sidecar
      is the console only, at http://127.0.0.1:9465/

It ends with 0 on Ctrl-C or SIGTERM, with 2 where a setting is wrong.
"""


def main() -> None:
    """Run the sidecar; exits with 2 and one line where a setting is wrong."""
    parser = argparse.ArgumentParser(
        prog="agx-sidecar",
        description="Exports the metrics and traces of agx; set up by AGX_* and OTEL_* variables.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"agx-sidecar {__version__}")
    parser.parse_args()
    # Where logfire is installed, pydantic would load it as a plugin, which takes as long as half of the start.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        settings = read_settings()
        set_up_logging(settings.log_level, settings.log_format)
        run(settings)
    except SettingsError as error:
        print(f"agx-sidecar: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
