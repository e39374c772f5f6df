"""The console's pages over HTTP: what is shown of which runs, in which order, and what is hidden."""

from __future__ import annotations

import dataclasses
import re
import time
from html import unescape
from html.parser import HTMLParser

import orjson
import pytest
from support.made_facts import T0, call, ended, node, resumed, run_of, started, tool, trace, usage
from support.replica import PARTITIONS, PREFIX, Queue
from support.visitor import OpenConsole, begin_live, say

from agx.facts.schema import encode
from agx.redis import keys
from agx.stream.entry import StreamEntry
from agx_sidecar.console.event_log import write_lines

SESSION = keys.SessionKeys(PREFIX, "acme", "u1", "s1")
RUN = "/run?scope=acme&user=u1&session=s1&run=run-1"
ATTACK = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"


class Elements(HTMLParser):
    """The names of all elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


@pytest.mark.parametrize(
    ("kind", "origin", "body", "text"),
    [
        ("info", "prompt", {"prompt": "Where?", "after": 0}, "Where?"),
        ("info", "prompt", {"prompt": None, "after": 2}, "goes on with the decided calls"),
        ("error", "opale", {"msg": "Too much.", "code": "limit_reached", "error_type": "E", "seq": 3}, "Too much."),
        ("info", "shop", {"a": 1}, '{"a":1}'),
    ],
)
def test_prompts_and_errors_are_shown_as_text(kind: str, origin: str, body: dict[str, object], text: str) -> None:
    (line,) = write_lines([StreamEntry((1, 0), kind, origin, orjson.dumps(body))], content=True)
    assert line.text == text
    (line,) = write_lines([StreamEntry((1, 0), kind, origin, orjson.dumps(body))], content=False)
    assert line.text == ""


def test_a_cancelled_run_shows_no_error() -> None:
    entries = [
        StreamEntry((1, 0), "error", "opale", b'{"msg": "canceled", "code": "run_canceled"}'),
        StreamEntry((2, 0), "end", "opale", b'{"outcome": "cancelled", "reason": "cancel"}'),
    ]
    (line,) = write_lines(entries, content=True)
    assert (line.what, line.about) == ("end", "cancelled · cancel")


def test_live_runs_then_lost_then_failed_then_the_rest(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "live-1", partitions=PARTITIONS)
    for n, outcome in enumerate(("failed", "completed", "lost", "cancelled", "failed")):
        queue.add(ended(f"{outcome}-{n}", outcome=outcome, session=f"s{n}"))
    queue.add(ended("sub-1", parent_run_id="completed-1"), started("open-1"))
    _, visitor = open_console()
    seen = visitor.get("/")
    assert seen.rows() == ["live-1", "lost-2", "failed-4", "failed-0", "cancelled-3", "completed-1"]
    assert visitor.get("/?q=s4").rows() == ["failed-4"]
    assert "Shows every live run, and every ended run that Redis still has." in seen.text
    # Each count leads to its list.
    counts = re.findall(r'<a href="#h-(\w+)"><strong>(\d+)</strong>', seen.text)
    assert counts == [("live", "1"), ("bad", "1"), ("bad", "2"), ("good", "1"), ("good", "1")]
    assert all(f'id="h-{key}"' in seen.text for key, _ in counts)


def test_it_looks_further_back_when_asked(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(ended("old", outcome="lost"))
    queue.add(*(started(f"r{n}") for n in range(600)))
    _, visitor = open_console()
    seen = visitor.get("/")
    assert seen.rows() == []
    further = re.search(r'href="([^"]+)">Look further back', seen.text)
    assert further is not None
    assert visitor.get(unescape(further[1])).rows() == ["old"]


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
    assert len(seen.rows()) == 50
    assert len(seen.text) < 60_000
    assert "Page 1 of 20" in seen.text
    pages = [seen.rows()]
    while following := re.search(r'href="([^"]+)" rel="next"', seen.text):
        seen = visitor.get(unescape(following[1]))
        pages.append(seen.rows())
    assert "Page 20 of 20" in seen.text
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
    custom = {"reason": "secret", "outcome": "secret", "model": "secret", "msg": "secret"}
    queue.redis.xadd(SESSION.stream, {"type": "info", "origin": "shop", "body": orjson.dumps(custom)})
    _, visitor = open_console()
    page = visitor.get(RUN).text
    assert "from shop" in page
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
    assert page.count('class="wait"') == 2  # both requests were waited for, and then answered
    assert "1,000 in, 200 out" in page
    assert "text · 10 characters in 2 events" in page
    assert "secret" not in page
    assert "Set AGX_CONSOLE_CONTENT=1 to show them" in page
    _, teller = open_console(AGX_CONSOLE_CONTENT="1")
    page = teller.get(RUN).text
    assert "The secret" in page
    assert "{&quot;n&quot;:1}" in page


def test_a_run_whose_stream_is_gone_is_reported_from_its_facts(open_console: OpenConsole, queue: Queue) -> None:
    failure = {"error_type": "app.BoomError", "error_message": "secret", "stage": "call_tools"}
    queue.add(started(), node(), tool(), ended(outcome="failed", **failure))
    _, visitor = open_console()
    for path in (RUN, "/run?scope=acme&run=run-1"):
        page = visitor.get(path).text
        assert "✘" in page
        assert "BoomError" in page
        assert "call tools" in page  # where it was
        assert "The stream has expired" in page
        assert re.findall(r'class="what \w*">(\w+)<', page) == ["begin", "part", "end"]
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
    assert "Nothing is stored" in seen.text


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
        assert parsed.names.count("img") == 1  # our own
        assert parsed.names.count("script") == 1
        assert not [name for name in parsed.attributes if name.startswith("on")]


def test_facts_of_one_run_do_not_leak_into_anothers_scope(open_console: OpenConsole, queue: Queue) -> None:
    other = run_of("run-1", scope="globex", user="u1", session="s1", trace=trace())
    key = queue.key(started())
    queue.add_raw([(key, encode(started())), (key, encode(tool(**{**other, "tool": "theirs"})))])
    _, visitor = open_console()
    assert "theirs" not in visitor.get(RUN).text


def bars(page: str) -> list[str]:
    """What the waterfall shows, from above, indented."""
    return [" " * int(depth) + name for depth, name in re.findall(r'class="kind \w+ d(\d)">([^<]+)<', page)]


@pytest.mark.parametrize("parent", ["53995c3f42cd8ad8", "a span of the service's own SDK"])
def test_a_sub_agent_stands_under_its_tool(open_console: OpenConsole, queue: Queue, parent: str) -> None:
    ask = tool(call_id="c2", tool="ask", start_ns=T0 + 30_000, end_ns=T0 + 90_000)
    other = tool(
        call_id="c1", tool="other", start_ns=T0 + 20_000, end_ns=T0 + 60_000, trace=trace("1" * 16, parent=None)
    )
    sub = run_of("sub-1", agent="helper", parent_run_id="run-1", trace=trace("2" * 16, parent))
    times = {"start_ns": T0 + 40_000, "end_ns": T0 + 80_000}
    queue.add(
        started(),
        started(**{**sub, "start_ns": times["start_ns"]}),
        node(**{**sub, **times, "id": "sub-1:node:0", "model": None, "node": "user_prompt"}),
        ended(**{**sub, **times, "id": "sub-1:end"}),
        tool(call_id="c3", tool="last", start_ns=T0 + 50_000, end_ns=T0 + 60_000, trace=trace("3" * 16)),
        other,
        ask,
        ended(),
    )
    _, visitor = open_console()
    assert bars(visitor.get(RUN).text) == ["support", "  other", "  ask", "   helper", "    user prompt", "  last"]


def test_runs_that_call_each_other_their_parents_are_drawn_once(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(started(parent_run_id="sub-1"), started("sub-1", parent_run_id="run-1", agent="helper"))
    _, visitor = open_console()
    assert bars(visitor.get("/run?scope=acme&run=run-1").text) == ["support", "   helper"]


def test_a_long_run_stays_a_page(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    second = 1_000_000_000
    queue.add(started())
    queue.add(*(node(idx=n, start_ns=T0 + n * second, end_ns=T0 + (n + 1) * second) for n in range(500)))
    pipeline = queue.redis.pipeline(transaction=False)
    for n in range(6_000):
        say(pipeline, SESSION, event="part_start", idx=n, event_idx=0, part_kind="text", content="word")
    pipeline.execute()
    _, visitor = open_console()
    page = visitor.get(RUN).text
    assert len(page) < 200_000
    shown = bars(page)
    assert len(shown) == 200
    assert (shown[0], shown[-1][:18]) == ("support", " model request 500")
    assert "301 steps before these are left out." in page
    assert page.count("<li id=") == 300
    assert "These are the newest." in page


def test_a_word_is_not_said_twice(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(
        started(), tool(outcome="error", error_type="lost"), ended(outcome="lost", error_type="lost", partial=True)
    )
    _, visitor = open_console()
    page = visitor.get(RUN).text
    assert "its process died; a sidecar finalized the run" in page
    assert page.count('class="word">lost') == 2  # the heading's and the run's
    assert ">lost</td>" not in visitor.get("/").text


DEEP = "[" * 500 + "]" * 500
ODD_BODIES = (
    '{"event":"part_delta","idx":{},"event_idx":[1],"part_kind":"text","content_delta":[]}',
    '{"event":["x"],"idx":true,"part_kind":{"a":1},"tool_name":3,"tool_call_id":[],"content":{"b":2}}',
    '{"event":"llm-begin","idx":1e300,"model":null,"agent":[]}',
    f'{{"event":"part_start","idx":0,"part_kind":"tool-return","content":{DEEP}}}',
    '{"event":"llm-end","idx":99999999999999999999999999}',
    "[]",
    "not json",
)


def test_whatever_somebody_adds_the_pages_stand(open_console: OpenConsole, queue: Queue) -> None:
    sidecar, visitor = open_console(AGX_CONSOLE_CONTENT="1")
    for n, body in enumerate(ODD_BODIES):
        for kind in ("event", "begin", "end", "error", "custom"):
            session = keys.SessionKeys(PREFIX, "acme", kind, f"s{n}")
            begin_live(queue.redis, session, f"run-{n}", partitions=PARTITIONS)
            queue.redis.xadd(session.stream, {"type": kind, "origin": "custom", "body": body})
            seen = visitor.get(f"/run?scope=acme&user={kind}&session=s{n}&run=run-{n}")
            assert (seen.status, "Cancel this run" in seen.text) == (200, True), (kind, body)
    assert len(visitor.get("/").rows()) == 35
    assert "Traceback" not in sidecar.log


def test_a_run_has_its_cost_and_leads_to_the_others_of_its_session(open_console: OpenConsole, queue: Queue) -> None:
    priced, unpriced = (call(usage=usage(cost_nano_usd=cost)) for cost in (1_500_000, None))
    queue.add(started(), node(model=priced), node(idx=1, model=dataclasses.replace(unpriced, request_model="ours")))
    queue.add(ended(), ended("other"), ended("foreign", session="s10"))
    _, visitor = open_console()
    page = visitor.get("/run?scope=acme&run=run-1&user=u1&session=s1").text
    # The second is looked up by the model that answered.
    assert re.search(r"<dt>Cost</dt><dd>\$0\.00\d\d</dd>", page)
    link = re.search(r'href="([^"]+)">all runs of this session', page)
    assert link is not None
    assert visitor.get(unescape(link[1])).rows() == ["other", "run-1"]


def test_scope_and_run_are_enough_for_a_link_from_a_board(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(started(), node(), ended(outcome="failed", error_type="LookupError"))
    _, visitor = open_console()
    page = visitor.get("/run?scope=acme&run=run-1")
    assert (page.status, "LookupError" in page.text) == (200, True)


def test_a_request_without_a_price_is_named(open_console: OpenConsole, queue: Queue) -> None:
    unknown = call(provider="in-house", request_model="ours", response_model="ours")
    queue.add(started(), node(model=unknown), ended(), *(started("run-2"), node("run-2", model=unknown)))
    queue.add(node("run-2", idx=1, model=call(usage=usage(cost_nano_usd=2_000_000))), ended("run-2"))
    _, visitor = open_console()
    assert "<dd>no known price</dd>" in visitor.get(RUN).text
    assert "$0.0020, without 1 of 2 requests, whose price is not known" in visitor.get(f"{RUN[:-1]}2").text


def test_the_conversation_is_shown_where_content_is_on(open_console: OpenConsole, queue: Queue) -> None:
    queue.add(started(), ended())
    messages = [
        {"kind": "request", "parts": [{"part_kind": "user-prompt", "content": ["<b>Weather?", {"kind": "image"}]}]},
        {"kind": "response", "parts": [{"part_kind": "tool-call", "tool_name": "look", "args": {"town": "Ulm"}}]},
        {"kind": "response", "parts": [{"part_kind": "text", "content": "Sunny"}, None]},
    ]
    key = "agx:acme:u1:s1:msgs"
    queue.redis.hset(key, "messages", orjson.dumps(messages))
    queue.redis.expire(key, 60)
    url = "/run?scope=acme&run=run-1&user=u1&session=s1"
    assert "Conversation" not in open_console()[1].get(url).text
    page = open_console(AGX_CONSOLE_CONTENT="1")[1].get(url).text
    talk = re.findall(r'<span class="what">([^<]+)</span><span class="text">([^<]*)</span>', page)
    assert talk == [
        ("user", "&lt;b&gt;Weather? [file]"),
        ("calls look", "{&quot;town&quot;:&quot;Ulm&quot;}"),
        ("agent", "Sunny"),
    ]
    queue.redis.hset(key, "messages", "no JSON")
    assert "Conversation" not in open_console(AGX_CONSOLE_CONTENT="1")[1].get(url).text


def test_a_run_without_a_process_is_recovering_and_can_be_cancelled(open_console: OpenConsole, queue: Queue) -> None:
    begin = {"session_id": "s1", "run_id": "run-1", "agent": "support", "seq": 0, "recover": 60}
    queue.redis.xadd(SESSION.stream, {"type": "begin", "origin": "opale", "body": orjson.dumps(begin)})
    queue.redis.expire(SESSION.stream, 600)
    say(queue.redis, SESSION, event="llm-begin", idx=1, model="gpt-4o-mini")
    queue.add(started(), node(), resumed(last_ns=T0 + 1_000_000_000))
    _, visitor = open_console()
    page = visitor.get(RUN).text
    assert "recovering, waits for a worker" in page
    assert 'data-every="1000"' in page
    bars = re.findall(r'class="kind (\w+ d\d)">([^<]+)<', page)
    assert bars == [
        ("run d0", "support"),
        ("model d1", "model request 1 · gpt-4o-mini-2024-07-18"),
        ("step d1", "attempt 2"),
    ]
    assert "resumed by another process" in page
    form = {"scope": "acme", "user": "u1", "session": "s1", "run": "run-1"}
    assert visitor.post("/cancel", form).status == 303
    assert "Cancellation is requested." in visitor.get(RUN).text


def _sub(run: str, event: str, parent: str = "run-1", **body: object) -> dict[str, object]:
    return {"event": event, "run": run, "parent_run": parent, "agent": f"agent {run}", "idx": 0, **body}


def test_the_events_of_sub_agents_are_folded_into_lines_of_their_own() -> None:
    text = {"event_idx": 0, "part_kind": "text"}
    bodies = [
        _sub("a", "run-begin"),
        _sub("b", "run-begin"),
        _sub("a", "part_start", content="from ", **text),
        _sub("b", "part_start", content="other", **text),
        _sub("deep", "llm-begin", "a"),
        _sub("a", "part_delta", content_delta="a", **text),
    ]
    entries = [StreamEntry((n, 0), "event", "sub-agent", orjson.dumps(body)) for n, body in enumerate(bodies)]
    own = StreamEntry((9, 0), "event", "pydantic-ai", orjson.dumps({"event": "part_delta", "idx": 0, **text}))
    first, second, last = write_lines([*entries, own], content=True)
    assert [line.about for line in (first, second)] == ["agent a", "agent b"]
    assert [(line.what, line.text) for line in first.inner] == [
        ("run-begin", ""), ("part", "from a"), ("sub-agent", ""),
    ]  # fmt: skip
    assert [line.what for line in first.inner[2].inner] == ["llm-begin"]
    assert [line.text for line in second.inner] == ["", "other"]
    assert last.inner == []


def test_a_page_folds_what_a_sub_agent_did(open_console: OpenConsole, queue: Queue) -> None:
    begin_live(queue.redis, SESSION, "run-1", partitions=PARTITIONS)
    sub = run_of("sub-1", agent=ATTACK, parent_run_id="run-1", trace=trace("2" * 16))
    queue.add(started(), started(**sub))
    for body in (_sub("sub-1", "run-begin"), _sub("sub-1", "part_start", part_kind="text", content="Secret")):
        say(queue.redis, SESSION, "sub-agent", **{**body, "agent": ATTACK})
    _, visitor = open_console()
    page = visitor.get(RUN).text
    assert re.search(r"<details><summary>sub-agent <b>&lt;img[^\n]*</summary><ol", page)
    assert page.count("data-fold=") == 1
    assert "Secret" not in page
    (elements := Elements()).feed(page)
    assert "onerror" not in elements.attributes
