"""Reads where Redis is from a URL (single, Cluster, Sentinel, unix socket, TLS), and opens a client there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode

from ..errors import AgxError
from .keys import check_prefix

Topology = Literal["single", "cluster", "sentinel"]
Client = Redis | RedisCluster

_LOCAL = "redis://localhost:6379/0"
_SCHEMES = "redis://, rediss://, unix://, redis+cluster://, redis+sentinel://, rediss+cluster:// or rediss+sentinel://"
_OPTIONS = {"ssl_ca_certs": str, "ssl_certfile": str, "ssl_keyfile": str, "protocol": int}


class AddressError(AgxError):
    """Raised where a URL, a password's file or a prefix can't be used; the message names the variable."""


@dataclass(frozen=True, slots=True)
class RedisAddress:
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


def read_address(environ: Mapping[str, str] = os.environ) -> RedisAddress:
    """Return where AGX_REDIS_URL points, with the password and the CA that the environment names apart.

    Raises:
        AddressError: one of these variables can't be used.
    """
    return parse_redis(environ.get("AGX_REDIS_URL") or _LOCAL, _password(environ), environ.get("AGX_REDIS_CA"))


def read_prefix(environ: Mapping[str, str] = os.environ) -> str:
    """Return the keys' prefix from AGX_KEY_PREFIX; raises AddressError."""
    try:
        return check_prefix(environ.get("AGX_KEY_PREFIX") or "agx")
    except ValueError as error:
        raise AddressError(f"AGX_KEY_PREFIX can't be used: {error}") from None


def parse_redis(url: str, password: str | None = None, ca: str | None = None) -> RedisAddress:
    """Return where a URL points; a password given apart wins over the URL's.

    Raises:
        AddressError: the URL is none of the known forms. The message does not repeat it: it may hold a password.
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
    return RedisAddress(
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


def open_redis(address: RedisAddress, **policy: Any) -> Client:
    """Return a client that connects on first use; `policy` are redis-py's settings of its connections."""
    common: dict[str, Any] = {"username": address.username, "password": address.password, **policy, **address.options}
    if address.topology == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.nodes]
        return RedisCluster(startup_nodes=nodes, ssl=address.tls, **common)
    if address.topology == "sentinel":
        timeouts = {name: value for name, value in policy.items() if name.endswith("_timeout")}
        guard = {**timeouts, **address.options, "ssl": address.tls}
        sentinel = Sentinel(address.nodes, sentinel_kwargs=guard, ssl=address.tls, **common)  # type: ignore[no-untyped-call]  # redis-py has no types here
        master: Redis = sentinel.master_for(address.master, db=address.database)
        return master
    if address.path is not None:
        return Redis(unix_socket_path=address.path, db=address.database, **common)
    (host, port), *_ = address.nodes
    return Redis(host=host, port=port, db=address.database, ssl=address.tls, **common)


def _bad_url(why: str) -> AddressError:
    return AddressError(f"AGX_REDIS_URL can't be used: {why}")


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
            raise AddressError(f"AGX_REDIS_PASSWORD_FILE can't be read: {type(error).__name__}: {path}") from None
    return environ.get("AGX_REDIS_PASSWORD") or None
