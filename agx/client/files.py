"""The client's files as they are served: content, media type, and the tag that changes with the content."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

CLIENT_FILES = ("agx.js", "agx.d.ts", "agx-react.js", "agx-react.d.ts")


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A file of the client."""

    content: bytes
    media_type: str
    etag: str  # with its quotation marks, as in the header


@cache
def read_client_file(name: str) -> ClientFile:
    """Return a file of the client; read once in a process."""
    content = files(__package__).joinpath(name).read_bytes()
    return tag_file(content, "text/javascript" if name.endswith(".js") else "text/plain")


def tag_file(content: bytes, media_type: str) -> ClientFile:
    """Return a file with its tag."""
    return ClientFile(content, media_type, f'"{sha256(content).hexdigest()[:32]}"')
