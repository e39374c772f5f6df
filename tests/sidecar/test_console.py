"""The console over HTTP: who gets in, what is shown, what is hidden, and what a cancel does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from conftest import StartReplica
from made_facts import T0, ended, node, run_of, started, tool, trace
from redis import Redis
from replica import PARTITIONS, PREFIX, Queue, Replica
from support.visitor import TOKEN, Visitor, begin_live, console_port, say
from support.waiting import wait_until_sync

from agx import keys
from agx.facts import encode
from agx_sidecar.settings import SettingsError, read_settings

SESSION = keys.SessionKeys(PREFIX, "acme", "u1", "s1")
RUN = "/run?scope=acme&user=u1&session=s1&run=run-1"
ATTACK = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"

OpenConsole = Callable[..., tuple[Replica, Visitor]]


class Elements(HTMLParser):
    """The names of all elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


@pytest.fixture
def open_console(start_replica: StartReplica) -> OpenConsole:
    """Starts a sidecar with a console and returns it with a visitor who is logged in."""

    def start(mode: str = "full", **environment: str) -> tuple[Replica, Visitor]:
        given = {"AGX_CONSOLE": mode, "AGX_CONSOLE_PORT": "0", "AGX_CONSOLE_TOKEN": TOKEN, "AGX_SINKS": "none"}
        sidecar = start_replica(**{**given, **environment})
        visitor = Visitor(console_port(sidecar))
        if environment.get("AGX_CONSOLE_TOKEN", TOKEN):
            assert visitor.log_in().status == 303
        return sidecar, visitor

    return start


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
    assert (console.host, console.port, console.can_cancel, console.shows_content) == (host, 9465, False, False)
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
    assert "may only read" in page
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
    assert "127.0.0.1 told run run-1 of acme/u1/s1 to stop: marked" in sidecar.log
    assert "being cancelled" in visitor.get(RUN).text
    assert visitor.post("/cancel", form).status == 303
    assert queue.redis.get(SESSION.live) == mark  # the first mark wins


def test_a_cancel_is_for_that_run_only(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-2", partitions=PARTITIONS)
    sidecar, visitor = open_console()
    assert visitor.post("/cancel", {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"}).status == 303
    assert queue.redis.get(SESSION.live) == b"run-2"
    assert "to stop: it was over" in sidecar.log


def test_ids_that_are_none_are_refused(open_console: OpenConsole, queue: Queue) -> None:
    _, visitor = open_console()
    for form in ({}, {"scope": "a:b", "user": "u", "session": "s", "run": "r"}, {"scope": "a"}):
        assert visitor.post("/cancel", form).status == 400
    assert visitor.get("/run?scope=a*&run=r&user=u&session=s").status == 400
    assert visitor.get("/run?scope=a&run=r:x").status == 400


def test_odd_requests_are_answered(open_console: OpenConsole) -> None:
    sidecar, visitor = open_console()
    assert visitor.get("/?page=99999999999&depth=-1&q=%00%ff").status == 200
    assert visitor.get("/?" + "&".join(f"a{n}=1" for n in range(50))).status == 400
    assert visitor.post("/login", {"token": "x" * 10_000}).status == 413
    assert visitor.post("/", {}).status == 404
    assert visitor.get("/cancel").status == 404
    assert visitor.get("/../../etc/passwd").status == 404
    assert "Traceback" not in sidecar.log


def test_live_runs_then_lost_then_failed_then_the_rest(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "live-1", partitions=PARTITIONS)
    for n, outcome in enumerate(("failed", "completed", "lost", "cancelled", "failed")):
        queue.add(ended(f"{outcome}-{n}", outcome=outcome, session=f"s{n}"))
    queue.add(ended("sub-1", parent_run_id="completed-1"), started("open-1"))
    _, visitor = open_console()
    seen = visitor.get("/")
    assert seen.rows() == ["live-1", "lost-2", "failed-4", "failed-0", "cancelled-3", "completed-1"]
    assert visitor.get("/?q=s4").rows() == ["failed-4"]
    assert "All 7 facts" in seen.text


def test_it_looks_further_back_when_asked(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(ended("old", outcome="lost"))
    queue.add(*(started(f"r{n}") for n in range(600)))
    _, visitor = open_console()
    seen = visitor.get("/")
    assert seen.rows() == []
    further = re.search(r'href="([^"]+)">Look further back', seen.text)
    assert further is not None
    assert visitor.get(further[1].replace("&amp;", "&")).rows() == ["old"]


def test_what_is_no_fact_is_passed_over(open_console: OpenConsole, queue: Queue) -> None:
    key = queue.key(ended())
    queue.add_raw([(key, b'{"kind":"run.end"'), (key, b'{"kind":"run.end","v":99}'), (key, encode(ended("good")))])
    _, visitor = open_console()
    assert visitor.get("/").rows() == ["good"]


def test_a_thousand_live_runs(open_console: OpenConsole, queue: Queue) -> None:
    for n in range(1_000):
        session = keys.SessionKeys(PREFIX, f"scope-{n % 50}", "u", f"s{n}")
        begin_live(queue.redis, session, f"run-{n}", partitions=PARTITIONS, agent=f"agent-{n}")
    _, visitor = open_console()
    seen = visitor.get("/")
    assert 'id="h-live">Live <span class="count">1,000</span>' in seen.text
    assert len(seen.rows()) == 100
    assert "Page 10" in seen.text
    pages = [visitor.get(f"/?page={n}").rows() for n in range(1, 11)]
    assert len({run for page in pages for run in page}) == 1_000
    assert visitor.get("/?q=agent-777").rows() == ["run-777"]
    # Issued together, they leave together: the console needs no connection for each.
    assert len(queue.redis.client_list()) < 10


def test_a_runs_page_shows_what_ended_what_is_open_and_what_was_said(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    queue.add(started(), node(), tool(), started("sub-1", parent_run_id="run-1", agent="helper", start_ns=T0 + 25_000))
    say(queue.redis, SESSION, event="llm-begin", idx=1, model="gpt-4o-mini")
    say(queue.redis, SESSION, event="part_start", idx=1, event_idx=0, part_kind="text", content="The ")
    say(queue.redis, SESSION, event="answer", idx=1)
    say(queue.redis, SESSION, event="part_delta", idx=1, event_idx=0, part_kind="text", content_delta="secret")
    say(
        queue.redis, SESSION, event="part_start", idx=1, event_idx=1, part_kind="tool-call", tool_name="look",
        tool_call_id="c9", args={"n": 1},
    )  # fmt: skip
    _, visitor = open_console()
    page = visitor.get(RUN).text
    names = re.findall(r'class="kind (\w+ d\d)">([^<]+)<', page)
    assert names == [
        ("run d0", "support"),
        ("model d1", "model request 1 · gpt-4o-mini-2024-07-18"),
        ("tool d2", "lookup"),
        ("run d3", "helper"),
        ("model d1", "model request 2 · gpt-4o-mini"),
        ("tool d2", "look"),
    ]
    assert page.count("under way") == 4  # both runs, the second request, the second tool
    assert "1,000 in, 200 out" in page
    assert "text · 10 characters in 2 events" in page
    assert "secret" not in page
    assert "AGX_CONSOLE_CONTENT=1 would show them" in page
    _, teller = open_console(AGX_CONSOLE_CONTENT="1")
    page = teller.get(RUN).text
    assert "The secret" in page
    assert "{&quot;n&quot;:1}" in page


def test_a_run_whose_stream_is_gone_is_told_from_its_facts(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(started(), node(), tool(), ended(outcome="failed", error_type="app.BoomError", error_message="secret"))
    _, visitor = open_console()
    for path in (RUN, "/run?scope=acme&run=run-1"):
        page = visitor.get(path).text
        assert "✘" in page
        assert "app.BoomError" in page
        assert "The stream has expired" in page
        assert re.findall(r'class="what \w*">(\w+)<', page) == ["begin", "end"]
        assert "secret" not in page
    assert "secret" in open_console(AGX_CONSOLE_CONTENT="1")[1].get(RUN).text


def test_the_stream_of_a_later_run_is_not_taken_for_this_ones(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(started(), ended())
    begin_live(queue.redis, SESSION, "run-2", partitions=PARTITIONS)
    say(queue.redis, SESSION, event="llm-begin", idx=0, model="later")
    _, visitor = open_console()
    page = visitor.get(RUN).text
    assert "later" not in page
    assert "Cancel this run" not in page


def test_nobody_remembers_a_run(open_console: OpenConsole, queue: Queue) -> None:
    _, visitor = open_console()
    seen = visitor.get("/run?scope=acme&user=u1&session=s1&run=never")
    assert seen.status == 404
    assert "Nothing is known" in seen.text


def test_a_dead_process_shows(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    leases = keys.leases(PREFIX, keys.partition("acme", queue.partitions))
    queue.redis.zadd(leases, {SESSION.lease_member("run-1"): int(time.time() * 1_000) - 1})
    assert queue.redis.delete(SESSION.live) == 1
    _, visitor = open_console()
    assert "dead, waits for a sidecar" in visitor.get("/").text
    assert "dead" in visitor.get(RUN).text


def test_what_strangers_name_is_text(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS, agent=ATTACK)
    hostile = {"agent": ATTACK, "error_type": ATTACK, "error_message": ATTACK, "outcome": "failed"}
    queue.add(ended("run-2", **hostile), started(agent=ATTACK), tool(tool=ATTACK, call_id=ATTACK, error_type=ATTACK))
    say(queue.redis, SESSION, event=ATTACK, idx=0, event_idx=0, part_kind=ATTACK, tool_name=ATTACK, content=ATTACK)
    _, visitor = open_console(AGX_CONSOLE_CONTENT="1")
    for path in ("/", RUN, "/run?scope=acme&run=run-2", "/?q=%3Cscript%3Ealert(1)%3C/script%3E"):
        page = visitor.get(path).text
        assert "&lt;script&gt;" in page
        parsed = Elements()
        parsed.feed(page)
        assert "img" not in parsed.names
        assert parsed.names.count("script") == 1
        assert not [name for name in parsed.attributes if name.startswith("on")]


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


def test_facts_of_one_run_do_not_leak_into_anothers_scope(open_console: OpenConsole, queue: Queue) -> None:
    other = run_of("run-1", scope="globex", user="u1", session="s1", trace=trace())
    key = queue.key(started())
    queue.add_raw([(key, encode(started())), (key, encode(tool(**{**other, "tool": "theirs"})))])
    _, visitor = open_console()
    assert "theirs" not in visitor.get(RUN).text
