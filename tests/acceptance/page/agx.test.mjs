// The client against a service that is played here: each request takes the next answer of its path's script.

import assert from "node:assert/strict";
import { test } from "node:test";

import { AgxError, apply, connect } from "../../../agx/client/agx.js";

const frame = (id, type, body = {}, origin = "opale") =>
  `id: ${id}\ndata: ${JSON.stringify({ id, type, origin, body })}\n\n`;
const begin = (id, run_id) => frame(id, "begin", { run_id });
const text = (id, content, idx = 0, seq = 1) =>
  frame(id, "event", { event: "part_start", part_kind: "text", content, idx, seq }, "pydantic-ai");
const end = (id, outcome = "completed") => frame(id, "end", { outcome });

/** An event stream: sends the text in pieces of 7 bytes, then closes, breaks, or stays silent. */
function stream(text, then = "close") {
  const bytes = new TextEncoder().encode(text);
  let at = 0;
  return new Response(
    new ReadableStream({
      pull(controller) {
        if (at < bytes.length) return controller.enqueue(bytes.slice(at, (at += 7)));
        if (then === "break") return controller.error(new TypeError("terminated"));
        if (then === "close") return controller.close();
        return new Promise(() => {});
      },
    }),
  );
}
const nothing = () => new Response(null, { status: 204 });
const json = (value, status = 200) => new Response(JSON.stringify(value), { status });

/** `scripts`: by the end of the path; behind its last event stream there is nothing more. */
function service(scripts, options = {}) {
  const requests = [];
  const fetch = async (url, init) => {
    requests.push(`${init.method ?? "GET"} ${url} ${init.headers["Last-Event-ID"] ?? ""}`.trim());
    const kind = url.split("/").at(-1).split("?")[0];
    const answer = scripts[kind]?.shift() ?? (kind === "events" ? nothing() : null);
    assert.ok(answer, `not expected: ${requests.at(-1)}`);
    if (answer instanceof Error) throw answer;
    // As a browser does: what is aborted ends with an error, also where nothing comes.
    if (!answer.body) return answer;
    const { readable, writable } = new TransformStream();
    answer.body.pipeTo(writable, { signal: init.signal }).catch(() => {});
    return new Response(readable, { status: answer.status });
  };
  return { client: connect("/api/", { fetch, backoff: 0.001, poll: 0.01, ...options }), requests };
}

async function collect(events) {
  const found = [];
  for await (const event of events) found.push(event);
  return found;
}

/** Follow until the state meets a condition. */
function shown(client, condition) {
  return new Promise((resolve) => {
    const follower = client.session("s").follow((state) => {
      if (!condition(state)) return;
      follower.close();
      resolve(state);
    });
  });
}
const contents = (state) => state.parts.map((part) => part.content ?? part.part_kind);
const conversation = (run_id, live, parts = [], last_event_id = null, outcome = null) =>
  json({ messages: [{ parts }], run_id, live, last_event_id, outcome });
const prompt = (content) => ({ part_kind: "user-prompt", content });

test("a cut connection goes on behind the last event, without a repeat", async () => {
  const { client, requests } = service({
    events: [
      stream(begin("1-0", "r") + text("2-0", "æøå") + "id: 3-0\ndata: {", "break"),
      new TypeError("fetch failed"),
      json({ detail: "later", code: "redis_unavailable" }, 503),
      stream(": keep-alive\n\n" + text("3-0", "b") + end("4-0")),
    ],
  });
  const failures = [];
  const events = client.session("a b").events({ onConnection: (error) => failures.push(error?.code ?? null) });
  const ids = (await collect(events)).map((event) => event.id);
  assert.deepEqual(ids, ["1-0", "2-0", "3-0", "4-0"]);
  const path = "GET /api/sessions/a%20b/events";
  assert.deepEqual(requests, [path, `${path} 2-0`, `${path} 2-0`, `${path} 2-0`]);
  assert.deepEqual(failures, [null, "network_error", "network_error", "redis_unavailable", null]);
});

test("a silent connection is made again", async () => {
  const { client, requests } = service({ events: [stream(begin("1-0", "r"), "silence"), stream(end("2-0"))] }, { silence: 0.05 });
  assert.equal((await collect(client.session("s").events())).length, 2);
  assert.equal(requests[1], "GET /api/sessions/s/events 1-0");
});

test("a refused request is not repeated, and its error is a sentence with a code", async () => {
  const cases = [
    [json({ detail: "The session has a live run.", code: "session_busy" }, 409), "session_busy", "The session has a live run."],
    [json({ detail: "unknown token" }, 401), "unauthenticated", "You are not signed in: sign in, then load the page again."],
    [json({ detail: "slow down" }, 429), "too_many_requests", "You have asked too often: wait a minute, then try again."],
    [new Response("<html>", { status: 500 }), "service_error", "The service failed to answer: try again later."],
    [new Response("<html>"), "answer_unreadable", "The service's answer can't be read: load the page again."],
    [new TypeError("x"), "network_error", "The service can't be reached: check the connection."],
  ];
  for (const [answer, code, message] of cases) {
    const { client, requests } = service({ runs: [answer] });
    await assert.rejects(client.session("s").start("Hi"), (error) => {
      assert.ok(error instanceof AgxError);
      assert.deepEqual([error.code, error.message], [code, message]);
      return true;
    });
    assert.equal(requests.length, 1);
  }
  await assert.rejects(collect(service({ events: [json({}, 401)] }).client.session("s").events()), { code: "unauthenticated" });
});

test("a lost run is shown as lost, and its prompt asked again", async () => {
  const scripts = {
    messages: [conversation("r", true, [prompt("Hi")])],
    runs: [json({ run_id: "r2" }, 202)],
    events: [
      stream(begin("1-0", "r") + text("2-0", "half"), "break"),
      nothing(),
      stream(begin("3-0", "r2") + text("4-0", "whole") + end("5-0")),
    ],
  };
  const { client, requests } = service(scripts, { poll: 60 }); // the new run is followed at once
  let asked = false;
  const states = [];
  const state = await new Promise((resolve) => {
    const follower = client.session("s").follow((state) => {
      states.push(state);
      if (state.outcome === "lost" && !asked) {
        asked = follower.retry();
      }
      if (state.outcome === "completed") follower.close(), resolve(state);
    });
  });
  const lost = states.find((state) => state.outcome === "lost");
  assert.deepEqual([lost.status, lost.error.code, contents(lost)], ["ready", "run_lost", ["Hi", "half"]]);
  assert.deepEqual([state.error, contents(state)], [null, ["Hi", "half", "Hi", "whole"]]);
  assert.ok(requests.includes("POST /api/sessions/s/runs"));
});

test("a run that no sidecar ends is shown as lost once the service reports it", async () => {
  const { client, requests } = service({
    messages: [conversation("r", true, [prompt("Hi")])],
    events: [
      stream(begin("1-0", "r"), "break"),
      ...Array.from({ length: 9 }, () => stream(frame("1-0", "error", { code: "run_lost", msg: "Lost." }))),
    ],
  }, { poll: 60 });
  const state = await shown(client, (state) => state.outcome === "lost");
  assert.deepEqual([state.status, state.error.code, contents(state)], ["ready", "run_lost", ["Hi"]]);
  assert.equal(requests.length, 3);
});

test("a message for a run that is over is refused without an error, any other refusal with one", async () => {
  const { client } = service({
    messages: [conversation("r", false)],
    steer: [json({ detail: "No live run.", code: "not_found" }, 404), json({ detail: "Too much.", code: "queue_full" }, 429)],
  }, { poll: 60 });
  const follower = client.session("s").follow(() => {});
  assert.equal(await follower.steer("And?"), false);
  assert.equal(follower.state.error, null);
  assert.equal(await follower.steer("And?"), false);
  assert.equal(follower.state.error.code, "queue_full");
  follower.close();
});

test("a page that is opened behind a lost run shows it, and can ask again", async () => {
  const scripts = {
    messages: [conversation("r", false, [prompt("Hi")], "2-0", "lost")],
    runs: [json({ run_id: "r2" }, 202)],
    events: [nothing(), stream(begin("3-0", "r2") + text("4-0", "Hello") + end("5-0"))],
  };
  const { client } = service(scripts, { poll: 60 });
  let asked;
  const state = await new Promise((resolve) => {
    const follower = client.session("s").follow((state) => {
      if (state.error?.code === "run_lost") asked ??= follower.retry();
      if (state.outcome === "completed") follower.close(), resolve(state);
    });
  });
  assert.deepEqual([state.error, contents(state)], [null, ["Hi", "Hi", "Hello"]]);
});

test("a client that was refused goes on once a run is started, for example after a login", async () => {
  const { client, requests } = service({
    messages: [json({}, 401), conversation("r", true, [prompt("Hi")])],
    runs: [json({ run_id: "r" }, 202)],
    events: [stream(begin("1-0", "r") + text("2-0", "Hello") + end("3-0"))],
  });
  let started;
  const state = await new Promise((resolve) => {
    const follower = client.session("s").follow((state) => {
      if (state.error?.code === "unauthenticated") started ??= follower.start("Hi");
      if (state.outcome === "completed") follower.close(), resolve(state);
    });
  });
  assert.deepEqual(contents(state), ["Hi", "Hello"]);
  assert.equal(requests.filter((request) => request.includes("/messages")).length, 2);
});

test("the error of a lost connection goes away with it, also while nothing is live", async () => {
  const { client } = service(
    { messages: [conversation("r", false, [prompt("Hi")])], events: [new TypeError("x"), new TypeError("x"), nothing()] },
    { backoff: 0.05 },
  );
  const seen = [];
  await shown(client, ({ error }) => seen.push(error?.code ?? null) && seen.includes("network_error") && !error);
});

test("a run that replaced the followed one is shown in its place", async () => {
  const { client, requests } = service({
    messages: [conversation("old", true, [prompt("One")]), conversation("new", true, [prompt("One"), prompt("Two")])],
    events: [
      stream(begin("1-0", "old") + frame("0", "info", { gap: true, superseded_by: "new" })),
      stream(begin("8-0", "new") + text("9-0", "Two!") + end("9-1")),
    ],
  });
  const state = await shown(client, (state) => state.outcome === "completed");
  assert.deepEqual(contents(state), ["One", "Two", "Two!"]);
  assert.equal(state.runId, "new");
  assert.ok(requests.includes("GET /api/sessions/s/events?follow=session 0"));
});

test("a turn of another page is shown, one that has already ended from what is stored", async () => {
  const { client } = service({
    messages: [
      conversation("r", false, [prompt("One")], "1-0"),
      conversation("r2", false, [prompt("One"), prompt("Two"), { part_kind: "text", content: "once" }], "4-0"),
    ],
    events: [nothing(), stream(begin("2-0", "r2") + text("3-0", "twice?") + end("4-0"))],
  });
  const state = await shown(client, (state) => state.runId === "r2");
  assert.deepEqual([state.status, contents(state)], ["ready", ["One", "Two", "once"]]);
});

test("one connection shows the turns of all pages", async () => {
  const { client, requests } = service({
    messages: [
      conversation("r", false, [prompt("One")], "1-0"),
      conversation("r2", true, [prompt("One"), prompt("Two")]),
      conversation("r3", true, [prompt("One"), prompt("Two"), prompt("Three")]),
    ],
    events: [stream(begin("2-0", "r2") + text("3-0", "two") + end("4-0", "failed") + begin("5-0", "r3") + text("6-0", "three") + end("7-0"), "silence")],
  });
  const state = await shown(client, (state) => state.outcome === "completed");
  assert.deepEqual([state.error, contents(state)], [null, ["One", "Two", "Three", "three"]]);
  assert.deepEqual(requests.filter((request) => request.includes("/events")), ["GET /api/sessions/s/events?follow=session 1-0"]);
});

test("the page's own turn is read once: its begin may come before the answer to its request", async () => {
  const answer = json({ run_id: "r" }, 202);
  const { client, requests } = service({
    messages: [conversation(null, false)],
    runs: [new Promise((resolve) => setTimeout(resolve, 50, answer))],
    events: [stream(begin("1-0", "r") + text("2-0", "Hello") + end("3-0"), "silence")],
  });
  let started;
  const state = await new Promise((resolve) => {
    const follower = client.session("s").follow((state) => {
      if (state.status === "ready") started ??= follower.start("Hi");
      if (state.outcome === "completed") follower.close(), resolve(state);
    });
    started = follower.start("Hi");
  });
  assert.deepEqual(contents(state), ["Hi", "Hello"]);
  assert.equal(requests.filter((request) => request.includes("/messages")).length, 1);
});

test("why a prompt was refused is shown until the next one, whatever ends meanwhile", async () => {
  const { client } = service({
    messages: [conversation("r0", false, [], "1-0")],
    runs: [new Promise((resolve) => setTimeout(resolve, 30, json({ run_id: "r" }, 202))), json({ detail: "slow down" }, 429)],
    events: [stream(begin("2-0", "r") + text("3-0", "Hello") + end("4-0"), "silence")],
  });
  let asked;
  const state = await new Promise((resolve) => {
    const follower = client.session("s").follow((state) => {
      if (state.outcome === "completed") follower.close(), resolve(state);
    });
    asked = [follower.start("One"), follower.start("Two")];
  });
  assert.deepEqual(await Promise.all(asked), [true, false]);
  assert.equal(state.error?.code, "too_many_requests");
});

test("a run that nobody ends is lost, and another process may still go on with it", async () => {
  const { client } = service({
    messages: [conversation("r", true, [prompt("One")])],
    events: [
      stream(begin("1-0", "r") + frame("2-0", "error", { msg: "Lost.", code: "run_lost" }), "silence"),
      stream(frame("3-0", "resume", { void: null }) + text("4-0", "late"), "silence"),
      stream(end("5-0")),
    ],
  }, { silence: 0.05 });
  const seen = [];
  await shown(client, ({ status, outcome }) => seen.push(`${status} ${outcome}`) && outcome === "completed");
  assert.equal(new Set(seen.slice(seen.indexOf("ready lost"))).size, 3, seen); // lost, running, completed
});

test("a deleted conversation is empty on each page", async () => {
  const { client } = service({
    messages: [conversation("r", false, [prompt("One")], "1-0")],
    events: [stream(frame("2-0", "end", { deleted: true }), "silence")],
  });
  const state = await shown(client, (state) => state.status === "ready" && state.parts.length === 0);
  assert.deepEqual([state.status, state.runId, state.outcome], ["ready", null, null]);
});

test("comments keep a silent connection", async () => {
  const kept = new ReadableStream({
    async pull(controller) {
      await new Promise((resolve) => setTimeout(resolve, 20));
      controller.enqueue(new TextEncoder().encode((this.sent = (this.sent ?? 0) + 1) < 15 ? ": keep-alive\n\n" : begin("1-0", "r") + end("2-0")));
    },
  });
  const { client, requests } = service({ events: [new Response(kept)] }, { silence: 0.1 });
  assert.equal((await collect(client.session("s").events())).length, 2);
  assert.equal(requests.length, 1);
});

test("a hidden page has no connection while nothing runs, and one again once it is visible", async () => {
  globalThis.document = Object.assign(new EventTarget(), { hidden: true });
  const show = (hidden) => {
    document.hidden = hidden;
    document.dispatchEvent(new Event("visibilitychange"));
  };
  try {
    const { client, requests } = service({
      messages: [conversation("r", false, [prompt("One")], "1-0"), conversation("r2", true, [prompt("Two")])],
      events: [stream("", "silence"), stream(begin("2-0", "r2") + end("3-0"), "silence")],
    }, { poll: 60 });
    const reads = () => requests.filter((request) => request.includes("/events")).length;
    const until = async (condition) => {
      while (!condition()) await new Promise((resolve) => setTimeout(resolve, 1));
    };
    const follower = client.session("s").follow(() => {});
    await until(() => follower.state.status === "ready");
    show(false);
    await until(() => reads() === 1);
    show(true);
    show(false);
    await until(() => follower.state.outcome === "completed");
    assert.equal(reads(), 2);
    follower.close();
  } finally {
    delete globalThis.document;
  }
});

test("conversations are listed, renamed, branched and deleted", async () => {
  const { client, requests } = service({
    sessions: [json({ conversations: [] })],
    title: [nothing()],
    "a%20b": [nothing()],
    branches: [json({ session_id: "new" }, 201)],
  });
  await client.conversations({ search: "a&b", limit: 5 });
  const session = client.session("a b");
  await session.rename("Title");
  assert.equal(await session.branch(3), "new");
  await session.delete();
  assert.deepEqual(requests, [
    "GET /api/sessions?search=a%26b&limit=5",
    "PUT /api/sessions/a%20b/title",
    "POST /api/sessions/a%20b/branches",
    "DELETE /api/sessions/a%20b",
  ]);
});

test("a cancelled run has an outcome and no error, a failed one its sentence", async () => {
  for (const [outcome, code, expected] of [["cancelled", "run_canceled", null], ["failed", "model_failed", "model_failed"]]) {
    const { client } = service({
      messages: [conversation("r", true)],
      events: [stream(begin("1-0", "r") + frame("2-0", "error", { msg: "A sentence.", code }) + end("3-0", outcome))],
    });
    const state = await shown(client, (state) => state.status === "ready");
    assert.deepEqual([state.outcome, state.error?.code ?? null], [outcome, expected]);
  }
});

test("parts: deltas, void parts of a resumed run, gaps, and events of a later version", () => {
  const part = (idx, seq, content) => ({ event: "part_start", part_kind: "text", idx, seq, content });
  const delta = (content_delta) => ({ event: "part_delta", part_kind: "text", content_delta });
  const after = (parts, body, type = "event", origin = "pydantic-ai") => apply(parts, { type, origin, body });
  let parts = after([], part(0, 1, "kept"));
  parts = after(parts, part(1, 5, "vo"));
  parts = after(parts, delta("id"));
  assert.deepEqual(parts.map((each) => each.content), ["kept", "void"]);
  parts = after(parts, { attempt: 2, void: { idx: 1, from_seq: 5 } }, "resume");
  parts = after(parts, { attempt: 3, void: null }, "resume");
  assert.deepEqual(parts.map((each) => each.content), ["kept"]);
  parts = after(parts, { gap: true }, "info", "agx");
  assert.equal(parts.at(-1).part_kind, "gap");
  assert.equal(after(parts, { event: "of-a-later-version" }), parts);
  assert.equal(after(parts, {}, "of-a-later-version"), parts);
});

test("sub-agents: in the call in which they run, whatever ids the calls have, until a resume drops them", () => {
  const call = (tool_call_id) => ({ event: "part_start", part_kind: "tool-call", tool_call_id });
  const tags = (run, parent_run, depth, parent_tool_call_id = "a") => ({ run, parent_run, agent: run[0], depth, parent_tool_call_id });
  let parts = [];
  const add = (body, origin = "sub-agent", type = "event") => (parts = apply(parts, { type, origin, body }));
  const said = (run, parent_run, depth, content_delta) => {
    add({ ...tags(run, parent_run, depth), event: "part_delta", part_kind: "text", content_delta });
  };
  add(call("a"), "pydantic-ai");
  for (const run of ["m1", "m2"]) {
    add({ ...tags(run, "r", 1), event: "run-begin" });
    add({ ...tags(run, "r", 1), ...call("a") });
    add({ ...tags(`l${run}`, run, 2), event: "part_start", part_kind: "text", content: "" });
    add({ ...tags(`d${run}`, `l${run}`, 3), event: "run-begin" }); // its call is not known: its start was trimmed
  }
  said("lm1", "m1", 2, "on");
  said("lm2", "m2", 2, "two");
  said("lm1", "m1", 2, "e");
  add({ ...tags("lm1", "m1", 2), event: "run-end", outcome: "completed" });
  assert.equal(parts.length, 1);
  const of = (part) => part.sub_agents.map((one) => [one.run, one.agent, one.outcome]);
  assert.deepEqual(of(parts[0]), [["m1", "m", null], ["m2", "m", null]]);
  const leaves = parts[0].sub_agents.map((one) => one.parts[0]);
  assert.deepEqual(leaves.map(of), [[["lm1", "l", "completed"]], [["lm2", "l", null]]]);
  assert.deepEqual(leaves.map((part) => part.sub_agents[0].parts[0].content), ["one", "two"]);
  assert.equal(add({ ...tags("x", "r", 1, "unknown"), event: "run-begin" }), parts);
  add({ void: null, void_runs: ["m1", "lm1"] }, "opale", "resume");
  assert.deepEqual(of(parts[0]), [["m2", "m", null]]);
});

const waits = (call_id, session_id = "s") => ({ call_id, session_id, tool: "refund", args: { euros: 20 }, kind: "approval" });
const toolCall = (tool_call_id) => ({ part_kind: "tool-call", tool_name: "refund", tool_call_id });
const called = (id, tool_call_id) => frame(id, "event", { event: "part_start", ...toolCall(tool_call_id) }, "pydantic-ai");

/** Follow, call `act` once the state has so many pending calls, and resolve with its result and the state it leads to. */
function acted(client, count, act, condition) {
  return new Promise((resolve) => {
    let result;
    const follower = client.session("s").follow((state) => {
      if (!result && state.pending.length === count) result = act(follower);
      if (!result || !condition(state)) return;
      follower.close();
      result.then((value) => resolve([value, state]));
    });
  });
}

test("the calls with which a run ended are shown, and the run that goes on after the last decision", async () => {
  let goOn;
  const { client, requests } = service({
    messages: [
      conversation("r", true, [prompt("Refund")]),
      conversation("r2", true, [prompt("Refund"), toolCall("c1"), toolCall("c2")]),
    ],
    events: [
      stream(begin("1-0", "r") + called("2-0", "c1") + called("3-0", "c2") + end("4-0")),
      new Promise((resolve) => (goOn = resolve)),
    ],
    approvals: [json({ calls: [waits("c1"), waits("c9", "other"), waits("c2")] })],
    decisions: [json({ run_id: null }, 202), json({ run_id: "r2" }, 202)],
  });
  const decide = async (chat) => {
    const decided = [await chat.deny("c1"), await chat.approve("c2", { args: { euros: 5 } })];
    goOn(stream(begin("5-0", "r2") + text("6-0", "Done") + end("7-0")));
    return decided;
  };
  const [decided, state] = await acted(client, 2, decide, (state) => contents(state).includes("Done"));
  assert.deepEqual([decided, state.pending], [[true, true], []]);
  assert.equal(requests.filter((request) => request === "POST /api/sessions/s/decisions").length, 2);
});

test("a decision that somebody else has made is an error, and what still waits is read again", async () => {
  const open = [prompt("Refund"), toolCall("c1"), toolCall("c2"), { part_kind: "tool-return", tool_call_id: "c2" }];
  const { client } = service({
    messages: [conversation("r", false, open, "1-0", "completed")],
    approvals: [json({ calls: [waits("c1")] }), json({ calls: [] })],
    decisions: [json({ detail: "Decided.", code: "conversation_changed" }, 409)],
  });
  const [decided, state] = await acted(client, 1, (chat) => chat.approve("c1"), (state) => !state.pending.length);
  assert.deepEqual([decided, state.error?.code], [false, "conversation_changed"]);
});

test("a conversation without open calls asks for none; the session's own requests name the run that goes on", async () => {
  const { client, requests } = service({
    messages: [conversation("r", false, [prompt("Hi"), { part_kind: "text", content: "Hello" }], "1-0", "completed")],
    decisions: [json({ run_id: "r2" }, 202)],
    approvals: [json({ calls: [waits("c1"), waits("c9", "other")] })],
  });
  await shown(client, (state) => state.status === "ready");
  assert.ok(!requests.some((request) => request.includes("approvals")));
  const session = client.session("s");
  assert.deepEqual((await session.pending()).map((call) => call.call_id), ["c1"]);
  assert.equal(await session.approve("c1", { key: "k" }), "r2");
});

test("a score is sent for the latest run; one that is refused is an error", async () => {
  const { client, requests } = service({
    messages: [conversation("r", false, [prompt("Hi")], "1-0", "completed")],
    feedback: [json({ recorded: true }), json({ detail: "No such run.", code: "run_unknown" }, 404)],
  });
  const [scored, error] = await new Promise((resolve) => {
    let scoring;
    const chat = client.session("s").follow((state) => {
      if (state.status === "ready") scoring ??= chat.score(1, { key: "k" }).then(async (first) => [first, await chat.score(0)]);
      if (!state.error) return;
      chat.close();
      scoring.then((scored) => resolve([scored, state.error.code]));
    });
  });
  assert.deepEqual([scored, error], [[true, false], "run_unknown"]);
  assert.equal(requests.filter((request) => request === "POST /api/sessions/s/feedback").length, 2);
});
