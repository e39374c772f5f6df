"""Reads the sidecar's settings from the environment; what is wrong is said with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from agx.errors import AgxError
from agx.keys import check_prefix

Sink = Literal["metrics", "traces"]
Topology = Literal["single", "cluster", "sentinel"]

_SCHEMES = "redis://, rediss://, unix://, redis+cluster://, redis+sentinel://, rediss+cluster:// or rediss+sentinel://"
_OPTIONS = {"ssl_ca_certs": str, "ssl_certfile": str, "ssl_keyfile": str, "protocol": int}


class SettingsError(AgxError):
    """Raised where the environment says something that the sidecar can't do; the message names the variable."""


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where Redis is. Nothing here may be printed but `place`."""

    topology: Topology
    nodes: tuple[tuple[str, int], ...]
    path: str | None = None  # of a unix socket
    master: str = ""  # Sentinel's name of the master
    database: int = 0
    tls: bool = False
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """The address without secrets."""
        return self.path or ",".join(f"{host}:{port}" for host, port in self.nodes)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one sidecar. Seconds."""

    redis: RedisSettings
    prefix: str = "agx"
    sinks: frozenset[Sink] = frozenset({"metrics"})
    http_host: str = "127.0.0.1"
    http_port: int = 9464
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"
    otlp_protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"
    lease: float = 5.0  # AGX_LEADER_LEASE, internal: tests shorten it
    claim_idle: float = 60.0  # AGX_CLAIM_IDLE, internal: idle time after which a pending fact's consumer is dead
    drain: float = 20.0  # AGX_DRAIN, internal: how long SIGTERM may take


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of an environment.

    Raises:
        SettingsError: a variable can't be understood.
    """
    return Settings(
        redis=parse_redis(
            environ.get("AGX_REDIS_URL") or "redis://localhost:6379/0", _password(environ), environ.get("AGX_REDIS_CA")
        ),
        prefix=_prefix(environ),
        sinks=_sinks(environ),
        http_host=environ.get("AGX_HTTP_HOST") or "127.0.0.1",
        http_port=_port(environ, "AGX_HTTP_PORT", 9464),
        log_level=_choice(environ, "AGX_LOG_LEVEL", ("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", str.upper),
        log_format="json"
        if _choice(environ, "AGX_LOG_FORMAT", ("text", "json"), "text", str.lower) == "json"
        else "text",
        otlp_protocol=_otlp_protocol(environ),
        lease=_seconds(environ, "AGX_LEADER_LEASE", 5.0),
        claim_idle=_seconds(environ, "AGX_CLAIM_IDLE", 60.0),
        drain=_seconds(environ, "AGX_DRAIN", 20.0),
    )


def parse_redis(url: str, password: str | None = None, ca: str | None = None) -> RedisSettings:
    """Return where `AGX_REDIS_URL` points; a password given apart wins over the URL's.

    Raises:
        SettingsError: the URL is none of the known forms. The message does not repeat it: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        raise _bad_url("it is not a URL") from None
    kind, _, form = parts.scheme.partition("+")
    if kind not in {"redis", "rediss", "unix"} or form not in {"", "cluster", "sentinel"} or (kind == "unix" and form):
        raise _bad_url(f"its scheme must be {_SCHEMES}")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, url_password = userinfo.partition(":")
    path = [unquote(part) for part in parts.path.split("/") if part]
    nodes: tuple[tuple[str, int], ...] = ()
    if kind == "unix":
        if not path:
            raise _bad_url("unix:// needs the path of a socket, as in unix:///run/redis.sock")
        database = query.pop("db", "0")
    else:
        nodes = tuple(_node(host, 26379 if form == "sentinel" else 6379) for host in hosts.split(","))
        database = query.pop("db", "0")
        if form == "sentinel":
            if not path:
                raise _bad_url(
                    "redis+sentinel:// needs the master's name, as in redis+sentinel://h1:26379,h2:26379/NAME/0"
                )
            database = path[1] if len(path) > 1 else database
        elif path:
            database = path[0]
    options = _options(query)
    if ca:
        options["ssl_ca_certs"] = ca
    return RedisSettings(
        topology="cluster" if form == "cluster" else "sentinel" if form == "sentinel" else "single",
        nodes=nodes,
        path="/" + "/".join(path) if kind == "unix" else None,
        master=path[0] if form == "sentinel" else "",
        database=_database(database, form),
        tls=kind == "rediss",
        username=unquote(username) or query.get("username"),
        password=password or unquote(url_password) or query.get("password"),
        options=options,
    )


def _bad_url(why: str) -> SettingsError:
    return SettingsError(f"AGX_REDIS_URL can't be used: {why}")


def _node(host: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        raise _bad_url("a host has no valid port; write host:port") from None
    if not name:
        raise _bad_url("a host is missing; write host:port")
    return name, port or default_port


def _database(text: str, form: str) -> int:
    if not text.isdecimal():
        raise _bad_url("the database after the host must be a number, as in redis://host:6379/0")
    if form == "cluster" and text != "0":
        raise _bad_url("a cluster has database 0 only")
    return int(text)


def _options(query: dict[str, str]) -> dict[str, Any]:
    known = {*_OPTIONS, "username", "password"}
    if unknown := sorted(query.keys() - known):
        raise _bad_url(f"option {unknown[0][:40]!r} is not known; {', '.join(sorted(known))} are")
    try:
        return {name: convert(query[name]) for name, convert in _OPTIONS.items() if name in query}
    except ValueError:
        raise _bad_url("protocol must be 2 or 3") from None


def _password(environ: Mapping[str, str]) -> str | None:
    if path := environ.get("AGX_REDIS_PASSWORD_FILE"):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"AGX_REDIS_PASSWORD_FILE can't be read: {type(error).__name__}: {path}") from None
    return environ.get("AGX_REDIS_PASSWORD") or None


def _prefix(environ: Mapping[str, str]) -> str:
    try:
        return check_prefix(environ.get("AGX_KEY_PREFIX") or "agx")
    except ValueError as error:
        raise SettingsError(f"AGX_KEY_PREFIX can't be used: {error}") from None


def _sinks(environ: Mapping[str, str]) -> frozenset[Sink]:
    text = environ.get("AGX_SINKS")
    if not text:
        has_collector = any(
            environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        )
        return frozenset({"metrics", "traces"} if has_collector else {"metrics"})
    sinks = {part.strip() for part in text.split(",")}
    if not sinks <= {"metrics", "traces"}:
        raise SettingsError(f"AGX_SINKS must be metrics, traces or metrics,traces, not {text!r}")
    return frozenset[Sink](sink for sink in ("metrics", "traces") if sink in sinks)


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) > 65_535:
        raise SettingsError(f"{name} must be a port from 0 to 65535 (0: any free one), not {text[:40]!r}")
    return int(text)


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise SettingsError(f"{name} must be a number of seconds above 0, not {text[:40]!r}")
    return value


def _choice(environ: Mapping[str, str], name: str, known: tuple[str, ...], default: str, fold: Any) -> str:
    value = str(fold(environ.get(name) or default))
    if value not in known:
        raise SettingsError(f"{name} must be one of {', '.join(known)}, not {value[:40]!r}")
    return value


def _otlp_protocol(environ: Mapping[str, str]) -> Literal["http/protobuf", "grpc"]:
    # The exporter classes do not read these two themselves.
    name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    if not environ.get(name):
        name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    value = _choice(environ, name, ("http/protobuf", "grpc"), "http/protobuf", str.lower)
    return "grpc" if value == "grpc" else "http/protobuf"
