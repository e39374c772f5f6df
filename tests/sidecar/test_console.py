"""The console over HTTP: who gets in, what may be loaded, and what a cancel does."""

from __future__ import annotations

import re
import time
from html import escape

import pytest
from redis import Redis
from starlette.requests import Request
from support.replica import PARTITIONS, PREFIX, Queue, StartReplica
from support.visitor import TOKEN, OpenConsole, Visitor, begin_live
from support.waiting import wait_until_sync

from agx.redis import keys
from agx_sidecar.console.auth import Gate
from agx_sidecar.settings import SettingsError, read_settings

SESSION = keys.SessionKeys(PREFIX, "acme", "u1", "s1")
RUN = "/run?scope=acme&user=u1&session=s1&run=run-1"


def test_off_unless_asked_for(start_replica: StartReplica) -> None:
    assert read_settings({}).console is None
    sidecar = start_replica()
    assert sidecar.get("/healthz")[0] == 200
    assert "console" not in sidecar.log


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "console.example"])
def test_off_loopback_it_needs_a_token(host: str) -> None:
    asked = {"AGX_CONSOLE": "read", "AGX_HTTP_HOST": host}
    with pytest.raises(SettingsError, match="AGX_CONSOLE_TOKEN"):
        read_settings(asked)
    with pytest.raises(SettingsError, match="at least 16 characters"):
        read_settings({**asked, "AGX_CONSOLE_TOKEN": "short"})
    console = read_settings({**asked, "AGX_CONSOLE_TOKEN": TOKEN}).console
    assert console is not None
    assert (console.host, console.port, console.can_write, console.shows_content) == (host, 9465, False, False)
    assert TOKEN not in repr(console)


@pytest.mark.parametrize(
    ("name", "value"), [("AGX_CONSOLE", "yes"), ("AGX_CONSOLE_PORT", "web"), ("AGX_CONSOLE_CONTENT", "true")]
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({"AGX_CONSOLE": "read", name: value})


def test_nothing_to_do_is_said() -> None:
    with pytest.raises(SettingsError, match="AGX_CONSOLE"):
        read_settings({"AGX_SINKS": "none"})


def test_only_the_token_opens_it(open_console: OpenConsole) -> None:
    sidecar, friend = open_console()
    stranger = Visitor(friend.port)
    for path in ("/", RUN, "/?q=x"):
        seen = stranger.get(path)
        assert (seen.status, seen.rows()) == (401, [])
        assert "Token" in seen.text
    assert stranger.post("/cancel", {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"}).status == 401
    for wrong in ("", TOKEN[:-1], TOKEN + "x", "ü" * 20):
        seen = stranger.log_in(wrong)
        assert seen.status == 403
        assert "That is not the token" in seen.text
    assert stranger.cookie is None
    assert len(re.findall("gave a wrong token", sidecar.log)) == 4
    assert TOKEN not in sidecar.log
    assert friend.get("/").status == 200


def test_the_cookie_is_kept_from_scripts_and_other_sites_and_can_not_be_made(open_console: OpenConsole) -> None:
    _, visitor = open_console()
    seen = visitor.log_in()
    assert seen.headers["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Strict")
    assert seen.headers["location"] == "/"
    proxied = visitor.post("/login", {"token": TOKEN}, **{"X-Forwarded-Proto": "https"})
    assert proxied.headers["set-cookie"].endswith("; Secure")
    name, _, value = (visitor.cookie or "").partition("=")
    expiry, _, signature = value.partition(".")
    assert TOKEN not in value
    for forged in (f"{int(expiry) + 1}.{signature}", f"{expiry}.", f"{expiry}.{signature[:-1]}", "..", "ü.ü", ""):
        assert Visitor(visitor.port, cookie=f"{name}={forged}").get("/").status == 401
    assert Visitor(visitor.port, cookie=f"other=1; {name}={value}").get("/").status == 200


def test_a_login_ends_after_twelve_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(TOKEN)
    cookie = gate.log_in(Request({"type": "http", "headers": []}), TOKEN)
    assert cookie is not None
    later = Request({"type": "http", "headers": [(b"cookie", cookie.split(";")[0].encode())]})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 12 * 3_600 - 5)
    assert gate.admits(later)
    monkeypatch.setattr(time, "time", lambda: now + 12 * 3_600 + 5)
    assert not gate.admits(later)
    assert not Gate(TOKEN[::-1]).admits(later)  # nor with another token


def test_a_link_to_a_run_survives_the_login(open_console: OpenConsole) -> None:
    _, friend = open_console()
    stranger = Visitor(friend.port)
    assert f'name="to" value="{escape(RUN)}"' in stranger.get(RUN).text
    assert f'name="to" value="{escape(RUN)}"' in stranger.post("/login", {"token": "wrong", "to": RUN}).text
    seen = stranger.post("/login", {"token": TOKEN, "to": RUN})
    assert (seen.status, seen.headers["location"]) == (303, RUN)
    elsewhere = ("//evil.example/", "https://evil.example", "/\\evil.example", "/run@evil.example", "/cancel")
    for to in (*elsewhere, "/?a\r\nSet-Cookie: agx_console=theirs", "/run?\u202e", ""):
        seen = stranger.post("/login", {"token": TOKEN, "to": to})
        assert (seen.status, seen.headers["location"]) == (303, "/")
        assert "theirs" not in seen.headers["set-cookie"]
    seen = stranger.get("/login")  # the address that a refused token leaves behind
    assert (seen.status, seen.headers["location"]) == (303, "/")


def test_a_cookie_that_was_planted_is_worth_nothing(open_console: OpenConsole) -> None:
    _, friend = open_console()
    planted = f"{int(time.time()) + 600}.{'0' * 64}"
    victim = Visitor(friend.port, cookie=f"agx_console={planted}")
    assert victim.get("/").status == 401
    seen = victim.log_in()
    assert planted not in seen.headers["set-cookie"]  # a login takes nothing over
    assert victim.get("/").status == 200


def test_every_replica_takes_the_cookie(open_console: OpenConsole) -> None:
    _, first = open_console()
    _, second = open_console()
    assert Visitor(second.port, cookie=first.cookie).get("/").status == 200


def test_a_form_of_another_site_does_nothing(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    sidecar, visitor = open_console()
    form = {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", ""):
        assert visitor.post("/cancel", form, Origin=origin).status == 403
        assert visitor.post("/login", {"token": TOKEN}, Origin=origin).status == 403
    assert queue.redis.get(SESSION.live) == b"run-1"
    assert "was not sent by its own page" in sidecar.log


def test_without_a_token_it_answers_as_localhost_only(open_console: OpenConsole) -> None:
    _, visitor = open_console(AGX_CONSOLE_TOKEN="")
    assert visitor.get("/").status == 200
    assert visitor.get("/", Host=f"localhost:{visitor.port}").status == 200
    # A page that made its own name lead to this machine.
    assert visitor.get("/", Host=f"evil.example:{visitor.port}").status == 403
    assert visitor.get("/", Host="[").status == 403


def test_nothing_is_loaded_from_elsewhere(open_console: OpenConsole) -> None:
    _, visitor = open_console()
    for path in ("/", RUN, "/nothing", "/console.css", "/console.js", "/icon.svg", "/login"):
        headers = visitor.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    for path in ("/", RUN, "/console.css", "/console.js"):
        assert not re.search(r"https?://|url\(|@import", visitor.get(path).text)


def test_read_can_not_cancel(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    _, visitor = open_console("read")
    page = visitor.get(RUN).text
    assert "Cancel this run" not in page
    assert "Read only. Set AGX_CONSOLE=full to allow cancelling." in page
    assert visitor.post("/cancel", {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"}).status == 403
    assert queue.redis.get(SESSION.live) == b"run-1"


def test_full_marks_the_lease_as_cancel_does_and_logs_it(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    sidecar, visitor = open_console()
    assert "Cancel this run" in visitor.get(RUN).text
    form = {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"}
    seen = visitor.post("/cancel", form)
    assert (seen.status, seen.headers["location"]) == (303, "/run?scope=acme&run=run-1&user=u1&session=s1")
    mark = queue.redis.get(SESSION.live)
    assert re.fullmatch(rb"cancel:run-1:\d{13}", mark)
    assert "127.0.0.1 cancelled run run-1 of acme/u1/s1: marked" in sidecar.log
    assert "being cancelled" in visitor.get(RUN).text
    assert visitor.post("/cancel", form).status == 303
    assert queue.redis.get(SESSION.live) == mark  # the first mark wins


def test_a_cancel_is_for_that_run_only(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-2", partitions=PARTITIONS)
    sidecar, visitor = open_console()
    late = visitor.post("/cancel", {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"})
    assert (late.status, "The run had already ended." in late.text) == (409, True)
    assert queue.redis.get(SESSION.live) == b"run-2"
    assert "acme/u1/s1: it was over" in sidecar.log


def test_ids_that_are_none_are_refused(open_console: OpenConsole, queue: Queue) -> None:
    _, visitor = open_console()
    for form in ({}, {"scope": "a:b", "user": "u", "session": "s", "run": "r"}, {"scope": "a"}):
        assert visitor.post("/cancel", form).status == 400
    assert visitor.get("/run?scope=a*&run=r&user=u&session=s").status == 400
    assert visitor.get("/run?scope=a&run=r:x").status == 400


def test_odd_requests_are_answered(open_console: OpenConsole) -> None:
    sidecar, visitor = open_console()
    assert visitor.get("/?page=99999999999&depth=-1&q=%00%ff").status == 200
    assert visitor.get("/?" + "&".join(f"a{n}=1" for n in range(50))).status == 200
    assert visitor.post("/login", {"token": "x" * 10_000}).status == 413
    assert visitor.post("/", {}).status == 405
    assert visitor.get("/cancel").status == 405
    assert visitor.get("/../../etc/passwd").status == 404
    assert "Traceback" not in sidecar.log


def test_an_outage_is_a_page_that_tries_again(open_console: OpenConsole, queue: Queue, redis_url: str) -> None:
    _, visitor = open_console()
    queue.redis.config_set("requirepass", "nobody-knows")
    try:
        queue.redis.client_kill_filter(_type="normal", skipme=True)
        seen = wait_until_sync(lambda: (seen := visitor.get("/")).status == 503 and seen)
        assert 'data-every="2000"' in seen.text
        assert "nobody-knows" not in seen.text
    finally:
        with Redis.from_url(redis_url, password="nobody-knows") as client:
            client.config_set("requirepass", "")
    wait_until_sync(lambda: visitor.get("/").status == 200)


def test_a_visitor_logs_out(open_console: OpenConsole) -> None:
    _, visitor = open_console(AGX_CONSOLE_TOKEN=TOKEN)
    visitor.log_in()
    assert 'action="/logout"' in visitor.get("/").text
    assert visitor.post("/logout", {}, Origin="http://elsewhere").status == 403
    left = visitor.post("/logout", {})
    assert (left.status, left.headers["location"]) == (303, "/")
    assert left.headers["set-cookie"].startswith("agx_console=; ")
    assert "Max-Age=0" in left.headers["set-cookie"]
    visitor.cookie = left.headers["set-cookie"].split(";")[0]
    asked = visitor.get("/")
    assert asked.status == 401
    assert "/logout" not in asked.text


@pytest.mark.parametrize(("trusted", "named"), [("", "127.0.0.1"), ("127.0.0.0/8", "203.0.113.7")])
def test_the_log_names_the_client_behind_a_trusted_proxy_only(
    open_console: OpenConsole, trusted: str, named: str
) -> None:
    sidecar, visitor = open_console(AGX_CONSOLE_TOKEN=TOKEN, AGX_CONSOLE_TRUSTED_PROXIES=trusted)
    # A client can send the header too: only what the proxy appended counts.
    visitor.post("/login", {"token": "wrong"}, **{"X-Forwarded-For": "198.51.100.1, 203.0.113.7"})
    wait_until_sync(lambda: f"{named} gave a wrong token" in sidecar.log)
