"""The runtime's `::meta`: the codec of what services agree on and the sidecar reads, and the script that writes it.

The first service fixes the number of partitions; the longest `lease_ttl` holds for all (contract, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import keys
from .bus import Script

FORMAT = 1  # of `::meta` and of the keys it describes
MOST_PARTITIONS = 65_536  # a larger number is junk: each partition costs a reader a command
_LONGEST_LEASE = 86_400.0  # seconds; deadlines expire after a day
_DEFAULT_LEASE = 15.0

# ARGV: format, partitions, lease_ttl in seconds, TTL. Replies the number of partitions in force.
PUBLISH = Script(f"""
redis.call('HSETNX', KEYS[1], 'format', ARGV[1])
local partitions = redis.call('HGET', KEYS[1], 'partitions') or ''
local number = string.match(partitions, '^%d+$') and tonumber(partitions) or 0
if number < 1 or number > {MOST_PARTITIONS} then redis.call('HSET', KEYS[1], 'partitions', ARGV[2]) end
local ttl = tonumber(redis.call('HGET', KEYS[1], 'lease_ttl') or '')
if not ttl or ttl < tonumber(ARGV[3]) then redis.call('HSET', KEYS[1], 'lease_ttl', ARGV[3]) end
redis.call('EXPIRE', KEYS[1], ARGV[4])
return redis.call('HGET', KEYS[1], 'partitions')
""")


@dataclass(frozen=True, slots=True)
class Meta:
    """What the services agreed on."""

    partitions: int
    lease_ttl: float  # seconds, the longest of all services
    format: int = FORMAT

    def to_args(self) -> tuple[int | float, ...]:
        """Return the arguments of `PUBLISH`."""
        return (self.format, self.partitions, self.lease_ttl, keys.INDEX_TTL)

    @property
    def is_newer(self) -> bool:
        """Whether a newer version wrote it."""
        return self.format > FORMAT


def parse_meta(fields: Mapping[Any, bytes | str]) -> Meta | None:
    """Return the meta of the hash's fields, or None where it has no usable number of partitions; never raises.

    An unusable `lease_ttl` is read as the default, an unusable `format` as this version's.
    """
    values = {_text(name): _text(value) for name, value in fields.items()}
    partitions = _positive_int(values.get("partitions", ""))
    if partitions is None or partitions > MOST_PARTITIONS:
        return None
    return Meta(partitions, _lease_ttl(values.get("lease_ttl", "")), _positive_int(values.get("format", "")) or FORMAT)


def parse_partitions(raw: bytes | None) -> int | None:
    """Return the number of partitions as HGET replies it, or None where it is unusable."""
    meta = parse_meta({"partitions": raw or b""})
    return None if meta is None else meta.partitions


def _positive_int(text: str) -> int | None:
    # Only ASCII digits: `isdigit()` also accepts superscripts, which `int()` refuses.
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        return None
    return int(text) or None


def _lease_ttl(text: str) -> float:
    try:
        ttl = float(text)
    except ValueError:
        return _DEFAULT_LEASE
    return ttl if math.isfinite(ttl) and 0 < ttl <= _LONGEST_LEASE else _DEFAULT_LEASE


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
