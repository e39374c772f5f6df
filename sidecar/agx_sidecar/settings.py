"""Reads the sidecar's settings from the environment, as docs/reference/configuration.md lists them.

An error names the variable and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Literal, get_args

from agx.errors import AgxError
from agx.redis.address import (
    AddressError,
    RedisAddress,
    read_address,
    read_prefix,
)
from agx.telemetry.conventions import Semconv

Sink = Literal["metrics", "traces"]
Protocol = Literal["http/protobuf", "grpc"]

_TOKEN_LENGTH = 16


class SettingsError(AgxError):
    """Raised for a setting that can't be used; the message names the variable."""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """How metrics are pushed over OTLP; times in seconds."""

    protocol: Protocol
    timeout: float  # of a push, the exporter's own retries included
    interval: float


@dataclass(frozen=True, slots=True)
class ConsoleSettings:
    """The console's settings. Without a token it is for this machine only."""

    can_write: bool
    shows_content: bool
    host: str
    port: int
    token: str | None = field(default=None, repr=False)
    trusted_proxies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one sidecar. Seconds."""

    redis: RedisAddress
    prefix: str = "agx"
    sinks: frozenset[Sink] = frozenset({"metrics"})
    http_host: str = "127.0.0.1"
    http_port: int = 9464
    console: ConsoleSettings | None = None
    semconv: Semconv = "current"
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"
    otlp_protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"
    push: PushSettings | None = None
    otlp_timeout: float = 10.0  # of a batch, the exporter's own retries included
    lease: float = 5.0  # AGX_LEADER_LEASE, internal: tests shorten it
    claim_idle: float = 60.0  # AGX_CLAIM_IDLE, internal: idle time after which a pending fact's consumer is dead
    drain: float = 20.0  # AGX_DRAIN, internal: how long SIGTERM may take


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of an environment.

    Raises:
        SettingsError: a variable can't be understood.
    """
    try:
        redis, prefix = read_address(environ), read_prefix(environ)
    except AddressError as error:
        raise SettingsError(str(error)) from None
    sinks, host = _sinks(environ), environ.get("AGX_HTTP_HOST") or "127.0.0.1"
    console = _console(environ, host)
    if not sinks and console is None:
        raise SettingsError("AGX_SINKS=none leaves nothing to do: set AGX_CONSOLE=read or full too, or name a sink")
    return Settings(
        redis=redis,
        prefix=prefix,
        sinks=sinks,
        http_host=host,
        http_port=_port(environ, "AGX_HTTP_PORT", 9464),
        console=console,
        semconv=_choice(environ, "AGX_SEMCONV", get_args(Semconv), "current", str.lower),  # type: ignore[arg-type]
        log_level=_choice(environ, "AGX_LOG_LEVEL", ("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", str.upper),
        log_format="json"
        if _choice(environ, "AGX_LOG_FORMAT", ("text", "json"), "text", str.lower) == "json"
        else "text",
        otlp_protocol=_otlp_protocol(environ, "TRACES"),
        otlp_timeout=_seconds(environ, _of_signal(environ, "TRACES", "TIMEOUT"), 10.0),
        push=_push(environ, sinks),
        lease=_seconds(environ, "AGX_LEADER_LEASE", 5.0),
        claim_idle=_seconds(environ, "AGX_CLAIM_IDLE", 60.0),
        drain=_seconds(environ, "AGX_DRAIN", 20.0),
    )


def _sinks(environ: Mapping[str, str]) -> frozenset[Sink]:
    text = environ.get("AGX_SINKS")
    if not text:
        has_collector = any(
            environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        )
        return frozenset({"metrics", "traces"} if has_collector else {"metrics"})
    if text == "none":
        return frozenset()
    sinks = {part.strip() for part in text.split(",")}
    if not sinks <= {"metrics", "traces"}:
        raise SettingsError(f"AGX_SINKS must be metrics, traces, metrics,traces or none, not {text!r}")
    return frozenset[Sink](sink for sink in ("metrics", "traces") if sink in sinks)


def _console(environ: Mapping[str, str], host: str) -> ConsoleSettings | None:
    mode = _choice(environ, "AGX_CONSOLE", ("off", "read", "full"), "off", str.lower)
    trusted = _networks(environ, "AGX_CONSOLE_TRUSTED_PROXIES")
    if mode == "off":
        return None
    token = environ.get("AGX_CONSOLE_TOKEN") or None
    if token is None and not _is_loopback(host):
        raise SettingsError(
            f"AGX_CONSOLE on {host} can be reached from other machines: set AGX_CONSOLE_TOKEN to a long random text, "
            "or AGX_HTTP_HOST to 127.0.0.1"
        )
    if token is not None and len(token) < _TOKEN_LENGTH:
        raise SettingsError(f"AGX_CONSOLE_TOKEN must have at least {_TOKEN_LENGTH} characters; make it a random text")
    return ConsoleSettings(
        can_write=mode == "full",
        shows_content=_choice(environ, "AGX_CONSOLE_CONTENT", ("0", "1"), "0", str) == "1",
        host=host,
        port=_port(environ, "AGX_CONSOLE_PORT", 9465),
        token=token,
        trusted_proxies=trusted,
    )


def _networks(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    given = [part.strip() for part in (environ.get(name) or "").split(",") if part.strip()]
    try:
        return tuple(str(ip_network(part)) for part in given)
    except ValueError as error:
        raise SettingsError(f"{name} must be addresses or networks with a comma between: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) > 65_535:
        raise SettingsError(f"{name} must be a port from 0 to 65535 (0: any free one), not {text[:40]!r}")
    return int(text)


def _seconds(environ: Mapping[str, str], name: str, default: float, most: float = 86_400) -> float:
    text = environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < most:
        unit = "seconds" if most == 86_400 else "milliseconds"
        raise SettingsError(f"{name} must be a number of {unit} above 0, not {text[:40]!r}")
    return value


def _choice(environ: Mapping[str, str], name: str, known: tuple[str, ...], default: str, fold: Any) -> str:
    value = str(fold(environ.get(name) or default))
    if value not in known:
        raise SettingsError(f"{name} must be one of {', '.join(known)}, not {value[:40]!r}")
    return value


def _push(environ: Mapping[str, str], sinks: frozenset[Sink]) -> PushSettings | None:
    if not _choice(environ, "AGX_METRICS_EXPORT", ("", "otlp"), "", str.lower):
        return None
    if "metrics" not in sinks:
        raise SettingsError("AGX_METRICS_EXPORT=otlp pushes what the metrics sink counts: add metrics to AGX_SINKS")
    return PushSettings(
        protocol=_otlp_protocol(environ, "METRICS"),
        timeout=_seconds(environ, _of_signal(environ, "METRICS", "TIMEOUT"), 10.0),
        interval=_seconds(environ, "OTEL_METRIC_EXPORT_INTERVAL", 60_000.0, most=86_400_000) / 1_000,
    )


def _otlp_protocol(environ: Mapping[str, str], signal: str) -> Protocol:
    # The exporter classes do not read these two themselves.
    name = _of_signal(environ, signal, "PROTOCOL")
    value = _choice(environ, name, ("http/protobuf", "grpc"), "http/protobuf", str.lower)
    return "grpc" if value == "grpc" else "http/protobuf"


def _of_signal(environ: Mapping[str, str], signal: str, setting: str) -> str:
    """Return the variable that sets something for a signal: its own one, else the one for all signals."""
    own = f"OTEL_EXPORTER_OTLP_{signal}_{setting}"
    return own if environ.get(own) else f"OTEL_EXPORTER_OTLP_{setting}"
