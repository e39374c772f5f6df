"""The documented command `python -m agx.server`, and another name of `agx.embedded.server`."""

from .embedded.server import EmbeddedServer, find_binary, main

__all__ = ["EmbeddedServer", "find_binary"]

if __name__ == "__main__":
    main()
