"""Every Redis key, channel and TTL of agx, and the rules for the ids in them (contract, section 4)."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field

Id = int | str

ID = re.compile(r"[A-Za-z0-9_.@=+|~-]{1,200}")
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]+")

INBOX_TTL = 86_400  # messages that no run has taken
STREAM_TTL = 86_400  # seconds; a live session's stream, refreshed by the lease's renewal
INDEX_TTL = 86_400  # the user's sessions, the runtime's meta and leases
JOBS_TTL = 7 * 86_400  # a jobs queue without news
QUEUE_TTL = 86_400  # a scope queue without news
STATE_TTL = 30 * 86_400  # the sidecar's metric state

# Messages of `jobs_wake_channel()`: a run waits for a takeover; a call is decided. Any other: a job waits.
WAKE_HANDED_OVER = b"handed over"
WAKE_DECIDED = b"decided"


def check_id(value: Id, name: str) -> str:
    """Return an id as it stands in keys.

    Raises:
        TypeError: it is neither an int nor a str (a bool is not an int here).
        ValueError: it has a character that could end a key's segment or match a pattern.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{name} must be an int or a str, not {type(value).__name__}")
    text = str(value)
    if not ID.fullmatch(text):
        raise ValueError(f"{name} must match [A-Za-z0-9_.@=+|~-]{{1,200}}, which {text[:40]!r} does not")
    return text


def check_prefix(value: str) -> str:
    """Return a key prefix; raises TypeError or ValueError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"key_prefix must be a str, not {type(value).__name__}")
    if not _PREFIX.fullmatch(value):
        raise ValueError(f"key_prefix must match [A-Za-z0-9_.:-]+, which {value[:40]!r} does not")
    return value


def partition(tenant: str, partitions: int) -> int:
    """Return the queue partition of a scope (or, for `process` facts, of a service's name)."""
    return zlib.crc32(tenant.encode()) % partitions


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one session."""

    prefix: str
    scope: str
    user: str
    session: str
    stream: str = field(init=False, repr=False, compare=False)  # each append needs it, so it is made once

    def __post_init__(self) -> None:
        object.__setattr__(self, "stream", f"{self.prefix}:{self.scope}:{self.user}:{self.session}")

    @classmethod
    def of(cls, prefix: str, scope_id: Id, user_id: Id, session_id: Id) -> SessionKeys:
        """Check the three ids, before Redis is touched, and return their keys."""
        return cls(
            prefix, check_id(scope_id, "scope_id"), check_id(user_id, "user_id"), check_id(session_id, "session_id")
        )

    @property
    def path(self) -> str:
        """The session's name for people: `scope/user/session`."""
        return f"{self.scope}/{self.user}/{self.session}"

    @property
    def live(self) -> str:
        return f"{self.stream}:live"

    @property
    def wake_channel(self) -> str:
        return f"{self.stream}:wake"

    @property
    def cancel_channel(self) -> str:
        return f"{self.stream}:cancel"

    @property
    def inbox(self) -> str:
        return f"{self.stream}:inbox"

    @property
    def index(self) -> str:
        return f"{self.prefix}:{self.scope}:{self.user}"

    @property
    def messages(self) -> str:
        """Where `RedisSession` keeps a conversation."""
        return f"{self.stream}:msgs"

    @property
    def saved(self) -> str:
        """The user's conversations in Redis, by the time they were last saved; no session id is empty."""
        return f"{self.index}::saved"

    def lease_member(self, run_id: str) -> str:
        """The member of `leases()`: no id has a colon, so `parse_lease_member()` takes it apart again."""
        return f"{self.scope}:{self.user}:{self.session}:{run_id}"


def parse_lease_member(prefix: str, member: str) -> tuple[SessionKeys, str]:
    """Return the session and the run id of a member of `leases()`; raises ValueError where it is none."""
    scope, user, session, run_id = member.split(":")
    return SessionKeys.of(prefix, scope, user, session), check_id(run_id, "run_id")


def queue(prefix: str, n: int) -> str:
    return f"{prefix}::queue:{n}"


def jobs(prefix: str, n: int) -> str:
    return f"{prefix}::jobs:{n}"


def approvals(prefix: str, n: int) -> str:
    """The tool calls that wait for a decision."""
    return f"{prefix}::approvals:{n}"


def workers(prefix: str) -> str:
    """The agents that workers serve, by the time (ms) at which one was last announced."""
    return f"{prefix}::workers"


def room(prefix: str) -> str:
    """The worker that makes room for a run that must run alone: it starts no other run. The key expires by itself."""
    return f"{prefix}::room"


def jobs_wake_channel(prefix: str) -> str:
    """The channel that wakes the workers."""
    return f"{prefix}::jobs:wake"


def leases(prefix: str, n: int) -> str:
    return f"{prefix}::leases:{n}"


def meta(prefix: str) -> str:
    return f"{prefix}::meta"


def metrics(prefix: str) -> str:
    return f"{prefix}::metrics"


def leader(prefix: str) -> str:
    return f"{prefix}::leader"
