"""Real servers in the shapes that agx claims: a cluster (3+3), Sentinel (3), and Redis 7.0 with TLS and an ACL file."""

from __future__ import annotations

import datetime
import functools
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis import Redis
from redis.exceptions import RedisError

from agx.embedded.child import Child, draw_ports
from agx.embedded.server import EmbeddedServer, find_binary

from .waiting import wait_until_sync

MASTER = "agx"  # Sentinel's name of the master
NODE_TIMEOUT_MS = 1_500

# Without the delay's flag a replica is in step only after 7 s.
_REPLICATED = ("--repl-diskless-sync-delay", "0")


class ClusterRig:
    """Three primaries with a replica each."""

    def __init__(self, servers: list[EmbeddedServer]) -> None:
        self.servers = servers

    @property
    def url(self) -> str:
        """For the sidecar's AGX_REDIS_URL."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:3])

    @property
    def nodes(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", server.port) for server in self.servers]

    def primaries(self) -> list[EmbeddedServer]:
        """Return the servers that are primaries now and answer."""
        return [server for server in self.servers if _role(server.port) == "master"]

    def primary_of(self, key: str) -> EmbeddedServer:
        """Return the primary that has a key, as its own cluster sees it."""
        with Redis(port=self.primaries()[0].port) as client:
            slot = int(client.execute_command("CLUSTER KEYSLOT", key))
            ranges = client.execute_command("CLUSTER", "SLOTS")
        for first, last, primary, *_ in ranges:
            if first <= slot <= last:
                return next(server for server in self.servers if server.port == primary[1])
        raise AssertionError(f"slot {slot} has no primary")

    def flush(self) -> None:
        for server in self.primaries():
            with Redis(port=server.port) as client:
                client.flushall()

    def is_whole(self) -> bool:
        """Whether every node answers, says that all is well, and has its replica or primary in step."""
        for server in self.servers:
            try:
                with Redis(port=server.port) as client:
                    info = client.cluster("INFO")
                    replication = client.info("replication")
            except RedisError:
                return False
            linked = replication.get("master_link_status", "up") == "up"
            served = replication["role"] == "slave" or replication["connected_slaves"] > 0
            if info["cluster_state"] != "ok" or int(info["cluster_known_nodes"]) < len(self.servers):
                return False
            if not (linked and served):
                return False
        return True


def _role(port: int) -> str | None:
    try:
        with Redis(port=port, socket_timeout=2) as client:
            return str(client.info("replication")["role"])
    except (RedisError, OSError):
        return None


@contextmanager
def cluster_rig() -> Iterator[ClusterRig]:
    """Start and form a cluster; about 2 s."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS), *_REPLICATED)
    with ExitStack() as stack:
        # A node keeps its place in the cluster in its directory, over kill() and start().
        servers = [stack.enter_context(EmbeddedServer(options=options)) for _ in range(6)]
        clients = [stack.enter_context(Redis(port=server.port)) for server in servers]
        bounds = [0, 5_461, 10_923, 16_384]
        for number, client in enumerate(clients[:3]):
            client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number:
                clients[0].execute_command("CLUSTER MEET", "127.0.0.1", servers[number].port)
        ids = [client.execute_command("CLUSTER MYID") for client in clients]
        for client, primary in zip(clients[3:], ids[:3], strict=True):
            wait_until_sync(functools.partial(_replicate, client, primary))
        rig = ClusterRig(servers)
        wait_until_sync(rig.is_whole, what="the cluster is whole")
        yield rig


def _replicate(client: Redis, primary: object) -> bool:
    try:
        client.execute_command("CLUSTER REPLICATE", primary)  # type: ignore[no-untyped-call] # redis-py has no types here
    except RedisError:  # it has not heard of it yet
        return False
    return True


class SentinelRig:
    """A primary, two replicas and three Sentinels."""

    def __init__(self, servers: list[EmbeddedServer], sentinel_ports: list[int]) -> None:
        self.servers = servers
        self.sentinel_ports = sentinel_ports

    @property
    def url(self) -> str:
        """For the sidecar's AGX_REDIS_URL."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{hosts}/{MASTER}/0"

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", port) for port in self.sentinel_ports]

    def primary(self) -> EmbeddedServer:
        """Return the server that the Sentinels name."""
        with Redis(port=self.sentinel_ports[0]) as client:
            _, port = client.sentinel_get_master_addr_by_name(MASTER)
        return next(server for server in self.servers if server.port == port)

    def flush(self) -> None:
        with Redis(port=self.primary().port) as client:
            client.flushall()

    def is_whole(self) -> bool:
        """Whether every Sentinel names one primary, which answers and has both replicas in step."""
        named = set()
        for port in self.sentinel_ports:
            with Redis(port=port) as client:
                state = client.sentinel_masters()[MASTER]
                named.add(state["port"])
                if state["num-slaves"] < 2 or state["num-other-sentinels"] < 2 or state["is_sdown"]:
                    return False
        if len(named) > 1 or _role(named.pop()) != "master":
            return False
        return _has_replicas(self.primary())


def _has_replicas(primary: EmbeddedServer) -> bool:
    """Return whether a primary has both replicas in step."""
    with Redis(port=primary.port) as client:
        replication = client.info("replication")
    return bool(sum(replication.get(f"slave{n}", {}).get("state") == "online" for n in range(2)) == 2)


@contextmanager
def sentinel_rig() -> Iterator[SentinelRig]:
    """Start a primary, its replicas and its Sentinels; about 2 s."""
    with ExitStack() as stack:
        primary = stack.enter_context(EmbeddedServer(options=_REPLICATED))
        follow = (*_REPLICATED, "--replicaof", f"127.0.0.1 {primary.port}")
        replicas = [stack.enter_context(EmbeddedServer(options=follow)) for _ in range(2)]
        # A Sentinel asks for replicas when it starts, then every 10 s.
        wait_until_sync(lambda: _has_replicas(primary), what="the replicas are in step")
        ports = [stack.enter_context(_sentinel(primary.port)) for _ in range(3)]
        rig = SentinelRig([primary, *replicas], ports)
        wait_until_sync(rig.is_whole, what="the Sentinels agree")
        yield rig


def _started(child: Child, port: int) -> bool:
    return child.ended or _answers(port)


@contextmanager
def _sentinel(primary_port: int) -> Iterator[int]:
    home = Path(tempfile.mkdtemp(prefix="agx-sentinel-"))
    for port in draw_ports(20):
        config = home / "sentinel.conf"  # it writes there what it learns
        config.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {home}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {primary_port} 2\n"
            f"sentinel down-after-milliseconds {MASTER} 1000\n"
            f"sentinel failover-timeout {MASTER} 3000\n"
        )
        child = Child([str(find_binary()), str(config), "--sentinel"], log=home / "log", home=home)
        try:
            wait_until_sync(functools.partial(_started, child, port), what="the Sentinel answers")
            if child.ended:
                continue  # its port was taken
            yield port
            break
        finally:
            child.end(SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


def _answers(port: int) -> bool:
    try:
        with Redis(port=port) as client:
            return bool(client.ping())
    except (RedisError, OSError):
        return False


class TlsRig:
    """Debian's Redis 7.0 behind TLS, with users from an ACL file; `admin` may do all, `default` nothing."""

    def __init__(self, server: EmbeddedServer, port: int, ca: Path, acl: Path) -> None:
        self.port = port
        self.ca = ca
        self._server = server
        self._acl = acl

    def admin(self) -> Redis:
        """Return a client that may do all."""
        return Redis(port=self.port, ssl=True, ssl_ca_certs=str(self.ca), username="admin", password="admin")

    @property
    def plain_url(self) -> str:
        """The same server without TLS, as `admin`."""
        return f"redis://admin:admin@127.0.0.1:{self._server.port}"

    def url(self, user: str) -> str:
        """For the sidecar's AGX_REDIS_URL, and for `from_url(..., ssl_ca_certs=)`."""
        return f"rediss://{user}:{user}@127.0.0.1:{self.port}"

    def set_users(self, rules: dict[str, str]) -> None:
        """Have the server load an ACL file with these users, each one's password being his name."""
        self.load_users("".join(f"user {name} on >{name} {rule}\n" for name, rule in rules.items()))

    def load_users(self, lines: str) -> None:
        """Have the server load an ACL file with these lines, besides an `admin`."""
        self._acl.write_text(_ADMIN + lines)
        with self.admin() as client:
            client.acl_load()


_ADMIN = "user default off\nuser admin on >admin ~* &* +@all\n"


@contextmanager
def tls_rig() -> Iterator[TlsRig]:
    """Start Redis 7.0 with certificates made for it."""
    binary = shutil.which("redis-server")
    assert binary, "redis-server is not on the PATH: install it, or deselect with -m 'not redis7'"
    home = Path(tempfile.mkdtemp(prefix="agx-tls-"))
    acl = home / "users.acl"
    acl.write_text(_ADMIN)
    ca, certificate, key = make_certificates(home)
    try:
        for port in draw_ports(20):
            options = (
                *("--tls-port", str(port), "--tls-auth-clients", "no"),
                *("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(ca)),
                *("--aclfile", str(acl)),
            )
            # Its plain port stays open on loopback: the users are the same there.
            with EmbeddedServer(binary=Path(binary), options=options) as server:
                rig = TlsRig(server, port, ca, acl)
                with rig.admin() as client:
                    try:
                        client.ping()
                    except (RedisError, OSError):  # the TLS port was taken
                        continue
                yield rig
                return
        raise AssertionError("no free port for TLS")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def make_certificates(home: Path) -> tuple[Path, Path, Path]:
    """Write an authority's certificate, and a certificate and key for 127.0.0.1 and localhost; return their paths."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agx test authority")])

    def certify(subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(authority_key, hashes.SHA256())
        )

    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    ca_certificate = certify(authority, authority_key, x509.BasicConstraints(ca=True, path_length=None))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    paths = home / "ca.crt", home / "server.crt", home / "server.key"
    paths[0].write_bytes(ca_certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(certify(subject, server_key, names).public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Hold a process still within the block, as a stalled machine would."""
    os.kill(pid, SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, SIGCONT)
