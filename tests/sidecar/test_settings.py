"""The environment: what it may say, and what is said about mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agx.redis.address import AddressError, RedisAddress, parse_redis
from agx_sidecar.settings import PushSettings, SettingsError, read_settings


def test_nothing_set_is_a_sidecar_for_local_metrics() -> None:
    settings = read_settings({})
    assert settings.redis == RedisAddress("single", (("localhost", 6379),))
    assert (settings.prefix, settings.sinks) == ("agx", frozenset({"metrics"}))
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 9464)


def test_metrics_are_pushed_only_where_asked() -> None:
    assert read_settings({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}).push is None
    given = {"AGX_METRICS_EXPORT": "OTLP", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"}
    assert read_settings(given).push == PushSettings("grpc", timeout=10.0, interval=60.0)
    with pytest.raises(SettingsError, match="add metrics to AGX_SINKS"):
        read_settings({"AGX_METRICS_EXPORT": "otlp", "AGX_SINKS": "traces"})
    with pytest.raises(SettingsError, match="AGX_METRICS_EXPORT must be one of"):
        read_settings({"AGX_METRICS_EXPORT": "statsd"})


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_a_collector_switches_traces_on(name: str) -> None:
    assert read_settings({name: "http://c:4318"}).sinks == {"metrics", "traces"}
    assert read_settings({name: "http://c:4318", "AGX_SINKS": "metrics"}).sinks == {"metrics"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:7000/3", RedisAddress("single", (("h", 7000),), database=3)),
        ("redis://h?db=2", RedisAddress("single", (("h", 6379),), database=2)),
        ("rediss://u:p%40ss@h", RedisAddress("single", (("h", 6379),), tls=True, username="u", password="p@ss")),
        ("unix:///run/r.sock?db=1", RedisAddress("single", (), path="/run/r.sock", database=1)),
        ("redis://[::1]:6380", RedisAddress("single", (("::1", 6380),))),
        ("redis+cluster://a:1,b:2", RedisAddress("cluster", (("a", 1), ("b", 2)))),
        ("rediss+cluster://:pw@a,b:2", RedisAddress("cluster", (("a", 6379), ("b", 2)), tls=True, password="pw")),
        (
            "redis+sentinel://a,b:5/mymaster/4",
            RedisAddress("sentinel", (("a", 26379), ("b", 5)), master="mymaster", database=4),
        ),
        (
            "rediss+sentinel://u:p@a:1/m",
            RedisAddress("sentinel", (("a", 1),), master="m", tls=True, username="u", password="p"),
        ),
        (
            "rediss://h?ssl_certfile=/c.pem&ssl_keyfile=/k.pem&protocol=3",
            RedisAddress(
                "single",
                (("h", 6379),),
                tls=True,
                options={"ssl_certfile": "/c.pem", "ssl_keyfile": "/k.pem", "protocol": 3},
            ),
        ),
    ],
)
def test_urls(url: str, expected: RedisAddress) -> None:
    assert parse_redis(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "localhost:6379",
        "redis+ring://h",
        "unix+cluster:///x",
        "unix://",
        "redis://:secret@",
        "redis://:secret@h:notaport",
        "redis://:secret@h:99999",
        "redis://:secret@h/db",
        "redis+cluster://:secret@a/1",
        "redis+sentinel://:secret@a:1",
        "redis://:secret@h?protcol=3",
        "redis://:secret@h?protocol=three",
        "redis://:secret@[::1",
    ],
)
def test_a_wrong_url_is_said_without_its_password(url: str) -> None:
    with pytest.raises(AddressError, match=r"AGX_REDIS_URL can't be used: .{10,}") as caught:
        parse_redis(url)
    assert "secret" not in str(caught.value)


def test_a_password_given_apart_wins(tmp_path: Path) -> None:
    url = {"AGX_REDIS_URL": "redis://u:old@h"}
    assert read_settings({**url, "AGX_REDIS_PASSWORD": "new"}).redis.password == "new"
    file = tmp_path / "password"
    file.write_text("from-file\n")
    settings = read_settings({**url, "AGX_REDIS_PASSWORD": "new", "AGX_REDIS_PASSWORD_FILE": str(file)})
    assert settings.redis.password == "from-file"
    assert "from-file" not in repr(settings)
    assert settings.redis.place == "h:6379"


def test_a_ca_is_handed_to_the_client() -> None:
    settings = read_settings({"AGX_REDIS_URL": "rediss://h", "AGX_REDIS_CA": "/ca.pem"})
    assert settings.redis.options["ssl_ca_certs"] == "/ca.pem"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AGX_SINKS", "metric"),
        ("AGX_HTTP_PORT", "http"),
        ("AGX_HTTP_PORT", "70000"),
        ("AGX_KEY_PREFIX", "a b"),
        ("AGX_LOG_LEVEL", "loud"),
        ("AGX_LOG_FORMAT", "xml"),
        ("AGX_SEMCONV", "old"),
        ("AGX_CONSOLE_TRUSTED_PROXIES", "*"),
        ("AGX_REDIS_PASSWORD_FILE", "/does/not/exist"),
        ("AGX_LEADER_LEASE", "soon"),
        ("AGX_LEADER_LEASE", "-1"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({name: value})


def test_the_traces_protocol_goes_before_the_general_one() -> None:
    both = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    assert read_settings(both).otlp_protocol == "grpc"


def run_sidecar(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGX_", "OTEL_"))}
    return subprocess.run(
        [sys.executable, "-m", "agx_sidecar"],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_exits_with_one_line_that_says_what_to_do() -> None:
    done = run_sidecar(AGX_REDIS_URL="redis://:secret@h/db")
    assert done.returncode == 2
    assert done.stderr.startswith("agx-sidecar: AGX_REDIS_URL can't be used: the database")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_an_exporter_that_can_not_be_set_up_is_said() -> None:
    done = run_sidecar(AGX_SINKS="traces", OTEL_EXPORTER_OTLP_PROTOCOL="grpc", OTEL_EXPORTER_OTLP_COMPRESSION="brotli")
    assert done.returncode == 2
    assert "OTEL_EXPORTER_OTLP_" in done.stderr
    assert done.stderr.count("\n") == 1
