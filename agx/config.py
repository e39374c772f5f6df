"""The runtime's settings, stored once at startup: `configure(Config(redis=...))`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from .errors import NotConfiguredError
from .facts.schema import Service
from .redis import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

    RedisClient = Redis | RedisCluster


@dataclass(frozen=True, eq=False)
class Config:
    """The runtime's settings.

    Args:
        redis: any asyncio redis-py client (single, Cluster, Sentinel). Only its settings are used: agx opens its own
            few connections, so the client's pool is never exhausted.
        key_prefix: what every key begins with; matches `[A-Za-z0-9_.:-]+`.
        lease_ttl: seconds after which a run whose process has stopped counts as lost; the lease is renewed every third
            of it.
        retention: seconds that a session's stream is kept after its `end`.
        max_stream_length: entries of a session stream, approximately.
        max_body: bytes; an event's body above it is cut and marked `truncated`.
        queue_partitions: number of scope queues; the first service that ever starts on a prefix fixes it.
        queue_max_length: entries over all scope queues, about 90 MB at the default.
        max_waiting_jobs: submitted runs of one scope that may wait for a worker; beyond, `submit()` raises.
        trace_ratio: share, 0 to 1, of traces begun here that are sampled, where the service has no OpenTelemetry SDK.
        describe_error: returns what listeners read of a failed run's exception; by default a sentence of the error
            catalogue, without the exception's own text, which may hold addresses and secrets.
        service_name: as in the resource of the service's telemetry; by default `OTEL_SERVICE_NAME`.
        service_version: likewise; by default from `OTEL_RESOURCE_ATTRIBUTES`.
        resource_attributes: more attributes of the service's resource, texts by name, for spans that the sidecar
            exports. From `OTEL_RESOURCE_ATTRIBUTES` it takes `deployment.environment.name`, `service.namespace`,
            `openinference.project.name` and `k8s.*`. Each fact carries them: at most 32, of 200 characters.

    Raises:
        TypeError: `redis` is no asyncio redis-py client, `key_prefix` no str, `describe_error` can't be called, or
            `resource_attributes` has something else than texts.
        ValueError: a setting is out of its range.
    """

    redis: RedisClient
    key_prefix: str = "agx"
    lease_ttl: float = 15.0
    retention: float = 300.0
    max_stream_length: int = 50_000
    max_body: int = 262_144
    queue_partitions: int = 8
    queue_max_length: int = 100_000
    max_waiting_jobs: int = 1_000
    trace_ratio: float = 1.0
    describe_error: Callable[[BaseException], str] | None = None
    service_name: str | None = None
    service_version: str | None = None
    resource_attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys.check_prefix(self.key_prefix)
        if not hasattr(self.redis, "execute_command") or not hasattr(self.redis, "aclose"):
            raise TypeError(f"Config.redis must be an asyncio redis-py client, not {type(self.redis).__name__}")
        if self.describe_error is not None and not callable(self.describe_error):
            raise TypeError("Config.describe_error must be a function that takes an exception and returns a text")
        if not all(isinstance(text, str) for pair in self.resource_attributes.items() for text in pair):
            raise TypeError("Config.resource_attributes must have texts only, names and values")
        for name, low in {"lease_ttl": 0.3, "retention": 1.0}.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"Config.{name} must be at least {low} seconds")
        for name in ("max_stream_length", "queue_partitions", "queue_max_length", "max_waiting_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config.{name} must be at least 1")
        if self.max_body < 1_024:
            raise ValueError("Config.max_body must be at least 1024 bytes")
        if not 0.0 <= self.trace_ratio <= 1.0:
            raise ValueError("Config.trace_ratio must lie between 0 and 1")


# What operators group traces by, of `OTEL_RESOURCE_ATTRIBUTES`; also `k8s.*`.
_PASSED = frozenset({"deployment.environment.name", "service.namespace", "openinference.project.name"})
_MOST_ATTRIBUTES, _LONGEST = 32, 200

_current: Config | None = None
_INSTANCE = uuid.uuid4().hex


def configure(config: Config) -> None:
    """Store the settings, once per process; nothing is connected before the first use.

    Raises:
        TypeError: it is no `Config`.
    """
    global _current  # noqa: PLW0603 - one configuration per process is the seed's API
    if not isinstance(config, Config):
        raise TypeError(f"configure() takes an agx.Config, not {type(config).__name__}")
    _current = config


def current_config() -> Config:
    """Return the settings; raises NotConfiguredError."""
    if _current is None:
        raise NotConfiguredError
    return _current


def describe_service(config: Config) -> Service:
    """Return the service's resource for facts: from the settings, else from the standard OTEL_* variables."""
    resource = {}
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, separator, value = pair.strip().partition("=")
        if separator:
            resource[key.strip()] = unquote(value.strip())  # the variable is percent-encoded
    name = config.service_name or os.environ.get("OTEL_SERVICE_NAME") or resource.get("service.name")
    passed = {key: value for key, value in resource.items() if key in _PASSED or key.startswith("k8s.")}
    passed |= config.resource_attributes
    return Service(
        name=name or "unknown_service",
        version=config.service_version or resource.get("service.version"),
        instance=resource.get("service.instance.id") or f"{_INSTANCE}-{os.getpid()}",
        attributes=tuple((key, value[:_LONGEST]) for key, value in passed.items())[:_MOST_ATTRIBUTES],
    )
