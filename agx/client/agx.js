/**
 * The client for pages: starts, follows and cancels runs through the router that `agx.web.make_router()` makes.
 *
 * An ES module without dependencies, for browsers and for Node 20 or later. Types: agx.d.ts.
 */

const VERSION = "1"; // sent with each request: a router that no longer supports it answers with a sentence
const NETWORK_ERROR = "network_error";
const SENTENCES = {
  [NETWORK_ERROR]: "The service can't be reached: check the connection.",
  unauthenticated: "You are not signed in: sign in, then load the page again.",
  forbidden: "You may not do this.",
  not_found: "The service has nothing at this address: check the prefix of the client.",
  request_too_large: "The request is too large.",
  too_many_requests: "You have asked too often: wait a minute, then try again.",
  answer_unreadable: "The service's answer can't be read: load the page again.",
  service_error: "The service failed to answer: try again later.",
  run_waits: "All workers are busy: the answer comes as soon as one is free.",
  run_lost: "The run was lost: the process that ran it has stopped.",
};
const CODES_OF_STATUS = { 401: "unauthenticated", 403: "forbidden", 404: "not_found", 413: "request_too_large", 429: "too_many_requests" };
const EMIT_MS = 16; // events that arrive together make one change of the state
const MAX_BACKOFF_MS = 15_000;
const LONGEST_MS = 2 ** 31 - 1; // of a browser's timer

/** An error as people read it; programs compare its `code`. `status` is 0 where no answer came. */
export class AgxError extends Error {
  constructor(code, message = SENTENCES[code], status = 0) {
    super(message);
    this.name = "AgxError";
    this.code = code;
    this.status = status;
  }
}

/** Return a client for the router at `prefix`. */
export function connect(prefix, options = {}) {
  return new Client(prefix, options);
}

class Client {
  constructor(prefix, { headers = () => ({}), fetch = globalThis.fetch, silence = 20, poll = 5, backoff = 1 }) {
    Object.assign(this, { prefix: prefix.replace(/\/$/, ""), headers, silence, poll, backoff });
    this.fetch = (...request) => fetch(...request); // a browser's fetch fails as a method of another object
  }

  session(id) {
    return new Session(this, id);
  }

  async conversations(page = {}) {
    return (await this.json(`/sessions?${new URLSearchParams(page)}`)).conversations;
  }

  async live() {
    return (await this.json("/live")).sessions;
  }

  /** The user's tool calls that wait for a decision, or for a result; the oldest first. */
  async pending() {
    return (await this.json("/approvals")).calls;
  }

  /** Send a request; raises AgxError unless the answer is a success. */
  async request(path, { headers, ...init } = {}) {
    const sent = { "Agx-Client": VERSION, ...headers, ...(await this.headers()) };
    let answer;
    try {
      answer = await this.fetch(this.prefix + path, { ...init, headers: sent });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new AgxError(NETWORK_ERROR);
    }
    if (answer.ok) return answer;
    const { detail, code } = await answer.json().catch(() => ({}));
    const found = code ?? CODES_OF_STATUS[answer.status] ?? "service_error";
    // Only what the router itself answers is written for people.
    throw new AgxError(found, (code && detail) || SENTENCES[found], answer.status);
  }

  async json(path, init) {
    const answer = await this.request(path, init);
    try {
      return await answer.json();
    } catch {
      throw new AgxError("answer_unreadable", undefined, answer.status);
    }
  }

  post(path, body) {
    return this.json(path, withBody("POST", body));
  }
}

class Session {
  constructor(client, id) {
    this.client = client;
    this.id = id;
    this.path = `/sessions/${encodeURIComponent(id)}`;
  }

  /** The stored conversation, and whether a run is live. */
  read() {
    return this.client.json(`${this.path}/messages`);
  }

  /** Start a run; its run_id. Raises AgxError `run_waits` where it is queued, and begins later. */
  async start(prompt) {
    const { run_id, begun } = await this.client.post(`${this.path}/runs`, { prompt });
    if (begun === false) throw new AgxError("run_waits", undefined, 202);
    return run_id;
  }

  /** Cancel the live run; false where it had already ended. */
  async cancel() {
    return (await this.client.json(`${this.path}/cancel`, { method: "POST" })).cancelled;
  }

  /** Give the conversation a title, which later turns do not change. */
  async rename(title) {
    await this.client.request(`${this.path}/title`, withBody("PUT", { title }));
  }

  /** Cancel the live run, and remove the conversation. */
  async delete() {
    await this.client.request(this.path, { method: "DELETE" });
  }

  /** Store the first `messages` messages as a new conversation. Returns its session id. */
  async branch(messages) {
    return (await this.client.post(`${this.path}/branches`, { messages })).session_id;
  }

  /** Give the live run a message. A second message with the same `key` is not added. Raises AgxError `not_found` where nothing runs. */
  async steer(text, key) {
    await this.client.post(`${this.path}/steer`, { text, key });
  }

  /** Record what the user thinks of a run that has ended: a thumb is 1 or 0. A second score with the same `key` is not counted. */
  async score(runId, value, { name, comment, key } = {}) {
    await this.client.post(`${this.path}/feedback`, { run_id: runId, value, name, comment, key });
  }

  /** The tool calls of this session that wait. */
  async pending() {
    return (await this.client.pending()).filter((call) => call.session_id === this.id);
  }

  /** Approve a call that waits. Returns the id of the run that goes on; null while other calls of the run wait. */
  approve(callId, options) {
    return this.#decide(callId, true, options);
  }

  /** Deny a call that waits. Returns what `approve()` returns. */
  deny(callId, options) {
    return this.#decide(callId, false, options);
  }

  async #decide(call_id, approve, { args, result, key } = {}) {
    return (await this.client.post(`${this.path}/decisions`, { call_id, approve, args, result, key })).run_id;
  }

  /**
   * Yield the latest run's events, from the first or after the cursor `after`, up to its `end`. A connection that is
   * cut, or silent for `silence` seconds, is made again, and goes on after the last event. It returns without an `end`
   * where the service has no further event: then nothing is to come, or the run is lost. With `follow: "session"` it
   * goes on with the session's next runs.
   */
  async *events({ after = "", signal, onConnection = () => {}, follow = "run" } = {}) {
    const { client } = this;
    const path = `${this.path}/events${follow === "session" ? "?follow=session" : ""}`;
    for (let attempt = 0, isLost = false; ; ) {
      const connection = new AbortController();
      const abort = () => connection.abort();
      signal?.addEventListener("abort", abort);
      let timer;
      const restart = () => {
        clearTimeout(timer);
        timer = setTimeout(abort, client.silence * 1000);
      };
      try {
        signal?.throwIfAborted();
        restart();
        const headers = after ? { "Last-Event-ID": after } : {};
        const answer = await client.request(path, { headers, signal: connection.signal });
        onConnection(null);
        if (answer.status === 204) return;
        for await (const { id, data } of frames(answer.body)) {
          restart();
          attempt = 0;
          if (!data) continue; // a comment, which keeps the connection
          if (id) after = id;
          const event = JSON.parse(data);
          yield event;
          if (event.type === "end" && follow === "run") return;
          isLost = event.type === "error" && event.body.code === "run_lost";
        }
        if (isLost) return; // no sidecar has ended the run: each further request would get this error again
      } catch (error) {
        if (signal?.aborted) return;
        const failed = error instanceof AgxError;
        if (failed && error.status >= 400 && error.status < 500 && ![408, 429].includes(error.status)) throw error;
        if (connection.signal.aborted) attempt = 0; // it was only silent
        else onConnection(failed ? error : new AgxError(NETWORK_ERROR));
      } finally {
        clearTimeout(timer);
        signal?.removeEventListener("abort", abort);
        abort();
      }
      if (attempt++) await pause(Math.min(client.backoff * 1000 * 2 ** (attempt - 2), MAX_BACKOFF_MS), signal);
    }
  }

  /** Show the session: call `onState` with each state, now and after each change, until `close()`. */
  follow(onState) {
    return new Follower(this, onState);
  }
}

/** What a page shows before it has read anything. */
export const INITIAL = Object.freeze({
  status: "loading",
  parts: [],
  pending: [],
  outcome: null,
  error: null,
  runId: null,
});

class Follower {
  #session;
  #onState;
  #closing = new AbortController();
  #wake = () => {};
  #isWoken = false;
  #timer;
  #cursor = "";
  #isLoaded = false;
  #isPendingRead = true;
  #lastPrompt = null;
  #connectionError = null;
  #starting = null; // a promise of all calls of start() so far
  #refusal = null; // the error of the last call of start(); shown until the next call
  #reading = new AbortController();

  constructor(session, onState) {
    this.#session = session;
    this.#onState = onState;
    this.state = INITIAL;
    this.#change({});
    const onVisibility = () => (globalThis.document.hidden ? this.#pauseIfHidden() : this.#readNow());
    globalThis.document?.addEventListener("visibilitychange", onVisibility, { signal: this.#closing.signal });
    void this.#run();
  }

  /** Start a run; what refuses it is the state's `error`. Returns whether it has begun. */
  start(prompt) {
    const starting = this.#start(prompt);
    this.#starting = Promise.all([this.#starting, starting]);
    return starting;
  }

  async #start(prompt) {
    this.#refusal = null;
    this.#change({ error: null });
    try {
      const runId = await this.#session.start(prompt);
      this.#lastPrompt = prompt;
      const parts = [...this.state.parts, { part_kind: "user-prompt", content: prompt }];
      if (this.state.runId !== runId) this.#change({ parts, runId, status: "running", outcome: null, pending: [] });
      this.#readNow();
      return true;
    } catch (error) {
      this.#refusal = error;
      this.#change({ error });
      return false;
    }
  }

  /** Approve a call of `pending`; false where it is refused: then `error` has the reason. */
  approve(callId, options) {
    return this.#decide(() => this.#session.approve(callId, options), callId);
  }

  /** Deny a call of `pending`; false where it is refused. */
  deny(callId, options) {
    return this.#decide(() => this.#session.deny(callId, options), callId);
  }

  /** Score the latest run, once for each `key`; false where it is refused. */
  async score(value, options) {
    this.#change({ error: null });
    try {
      await this.#session.score(this.state.runId, value, options);
      return true;
    } catch (error) {
      this.#change({ error });
      return false;
    }
  }

  async #decide(send, callId) {
    this.#change({ error: null });
    try {
      await send();
      this.#change({ pending: this.state.pending.filter((call) => call.call_id !== callId) });
      this.#readNow();
      return true;
    } catch (error) {
      this.#change({ error });
      if ([404, 409].includes(error.status)) {
        this.#isPendingRead = false; // somebody else has decided: show what still waits
        this.#reading.abort();
      }
      this.#readNow();
      return false;
    }
  }

  /** Ask the last prompt again: after a lost, failed or cancelled run. */
  async retry() {
    return this.#lastPrompt !== null && this.start(this.#lastPrompt);
  }

  /** Cancel the live run; false where it had already ended, or where the request failed. */
  async cancel() {
    try {
      return await this.#session.cancel();
    } catch (error) {
      this.#change({ error });
      return false;
    }
  }

  /** Give the live run a message; false where nothing runs, or where the request failed. */
  async steer(text) {
    this.#change({ error: null });
    try {
      await this.#session.steer(text);
      return true;
    } catch (error) {
      if (error.code !== "not_found") this.#change({ error });
      return false;
    }
  }

  close() {
    this.#closing.abort();
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#wake();
  }

  #readNow() {
    this.#isWoken = true; // it may be reading, and sleep only then
    this.#wake();
  }

  /** Read which calls wait, where the parts have one without a result. */
  async #readPending() {
    const returned = new Set(this.state.parts.filter((part) => part.part_kind !== "tool-call").map((part) => part.tool_call_id));
    const isOpen = (part) => part.part_kind === "tool-call" && !returned.has(part.tool_call_id);
    this.#change({ pending: this.state.parts.some(isOpen) ? await this.#session.pending() : [] });
    this.#isPendingRead = true;
  }

  async #run() {
    const { client } = this.#session;
    const { signal } = this.#closing;
    for (let failures = 0; !signal.aborted; ) {
      try {
        if (!this.#isLoaded) await this.#load();
        if (!this.#isPendingRead && this.state.status === "ready") await this.#readPending();
        const isBehind = await this.#read(signal);
        failures = 0;
        if (!isBehind) await this.#sleep(client.poll * 1000);
      } catch (error) {
        if (signal.aborted) return;
        this.#change({ error });
        const isRefused = error.status >= 400 && error.status < 500;
        if (isRefused) this.#change({ status: "ready" }); // until a run is started here
        await this.#sleep(isRefused ? LONGEST_MS : Math.min(client.backoff * 1000 * 2 ** failures++, MAX_BACKOFF_MS));
      }
    }
  }

  async #load() {
    const { messages, run_id, live, last_event_id, outcome } = await this.#session.read();
    const parts = messages.flatMap((message) => message.parts);
    this.#lastPrompt = textOf(parts.findLast((part) => part.part_kind === "user-prompt")) || null;
    this.#cursor = live ? "" : (last_event_id ?? "");
    this.#isLoaded = true;
    const error = outcome === "lost" ? new AgxError("run_lost") : this.#refusal;
    this.#change({ parts, runId: run_id, status: live ? "running" : "ready", outcome, error });
    this.#isPendingRead = live;
  }

  /** Show the session's runs as they come; true if the page has loaded the conversation meanwhile, and has to read the events after it. */
  async #read(signal) {
    const known = this.state.runId;
    const onConnection = (failed) => {
      const { status, error } = this.state;
      if (failed) this.#change({ error: failed, status: status === "running" ? "reconnecting" : status });
      else if (this.#connectionError)
        this.#change({ error: error === this.#connectionError ? null : error, status: status === "reconnecting" ? "running" : status });
      this.#connectionError = failed;
    };
    let failure = null;
    this.#reading = new AbortController();
    const reading = AbortSignal.any([signal, this.#reading.signal]);
    this.#pauseIfHidden();
    const events = this.#session.events({ after: this.#cursor, signal: reading, onConnection, follow: "session" });
    for await (const event of events) {
      this.#cursor = event.id ?? this.#cursor;
      if (event.type === "begin" && event.body.run_id !== this.state.runId) await this.#starting; // it may be our own
      if (event.type === "begin" && event.body.run_id !== this.state.runId) {
        await this.#load();
        // It has ended, and what was read has its answer; or another run has begun, which is read from its first event.
        if (this.state.status === "ready" || this.state.runId !== event.body.run_id) return true;
      }
      if (event.type === "begin") this.#change({ status: "running", outcome: null, pending: [] });
      if (event.type === "resume" && this.state.outcome) this.#change({ status: "running", outcome: null, error: null });
      if (event.type === "error" && event.body.code) {
        failure = new AgxError(event.body.code, event.body.msg);
        // Its process died, and nobody has ended it yet.
        if (failure.code === "run_lost") this.#change({ status: "ready", outcome: "lost", error: failure });
      }
      if (event.type === "end") {
        const { outcome, deleted } = event.body;
        // A run that was cancelled has no error to show.
        const error = outcome === "completed" || outcome === "cancelled" ? this.#refusal : failure;
        this.#change(deleted ? { ...INITIAL, status: "ready" } : { status: "ready", outcome, error });
        failure = null;
        this.#isPendingRead = outcome !== "completed";
        if (!this.#isPendingRead) await this.#readPending();
        this.#pauseIfHidden();
        continue;
      }
      const parts = apply(this.state.parts, event);
      if (parts !== this.state.parts) this.#change({ parts });
    }
    if (!reading.aborted && this.state.status !== "ready" && this.state.runId === known)
      this.#change({ status: "ready", outcome: "lost", error: new AgxError("run_lost") });
  }

  /** Close the connection of a hidden page while nothing runs: a browser allows few connections to a service. */
  #pauseIfHidden() {
    if (globalThis.document?.hidden && this.state.status === "ready") this.#reading.abort();
  }

  async #sleep(milliseconds) {
    const waking = new AbortController();
    this.#wake = () => waking.abort();
    if (this.#isWoken || this.#closing.signal.aborted) waking.abort();
    this.#isWoken = false;
    do await pause(milliseconds, waking.signal);
    while (globalThis.document?.hidden && !waking.signal.aborted); // a hidden page does not ask
  }

  #change(changes) {
    this.state = { ...this.state, ...changes };
    if (!this.#closing.signal.aborted)
      this.#timer ??= setTimeout(() => {
        this.#timer = undefined;
        this.#onState(this.state);
      }, EMIT_MS);
  }
}

/** Return the parts after an event: the same array where the event changes none. Unknown events change none. */
export function apply(parts, { type, origin, body }) {
  if (origin === "sub-agent") return nest(parts, body, body.depth);
  if (body.event === "part_start") return [...parts, body];
  if (body.event === "part_delta") {
    const index = parts.findLastIndex((part) => part.part_kind === body.part_kind);
    if (index < 0 || typeof body.content_delta !== "string") return parts;
    return parts.with(index, { ...parts[index], content: (parts[index].content ?? "") + body.content_delta });
  }
  if (type === "info" && origin === "prompt" && body.prompt) {
    const last = parts.findLast((part) => part.part_kind === "user-prompt");
    // The page shows its own prompt already.
    return textOf(last) === body.prompt && !body.steer ? parts : [...parts, { part_kind: "user-prompt", content: body.prompt }];
  }
  // Another process goes on with the run: what the first one had begun to answer does not count.
  if (type === "resume" && (body.void || body.void_runs)) return withoutVoid(parts, body);
  // The cursor is older than what the service retains.
  if (type === "info" && body.gap && !body.superseded_by) return [...parts, { part_kind: "gap" }];
  return parts;
}

/** Return the parts with an event of a sub-agent in the tool call in which it runs, `depth` levels below these parts. */
function nest(parts, body, depth) {
  const hasCall = (part) => part.part_kind === "tool-call" && part.tool_call_id === body.parent_tool_call_id;
  const add = (one) => (one.run === body.run ? addStep(one, body) : one);
  const below = (one) => (depth > 2 || one.run === body.parent_run ? { ...one, parts: nest(one.parts, body, depth - 1) } : one);
  if (depth > 1) return parts.map((part) => (part.sub_agents ? { ...part, sub_agents: part.sub_agents.map(below) } : part));
  const index = parts.findLastIndex(hasCall);
  if (index < 0) return parts;
  const known = parts[index].sub_agents ?? [];
  const all = known.some((one) => one.run === body.run) ? known : [...known, { run: body.run, agent: body.agent, outcome: null, parts: [] }];
  return parts.with(index, { ...parts[index], sub_agents: all.map(add) });
}

function withoutVoid(parts, body) {
  const counts = (part) => !body.void || part.idx !== body.void.idx || part.seq < body.void.from_seq;
  const known = (one) => !body.void_runs?.includes(one.run);
  return parts.filter(counts).map((part) => (part.sub_agents ? { ...part, sub_agents: part.sub_agents.filter(known) } : part));
}

function addStep(subAgent, body) {
  if (body.event === "run-end") return { ...subAgent, outcome: body.outcome };
  return { ...subAgent, parts: apply(subAgent.parts, { type: "event", origin: "", body }) };
}

/** Return the text of a part; other content as JSON. */
export function textOf(part) {
  const content = part?.content ?? "";
  if (typeof content === "string") return content;
  if (part.part_kind === "user-prompt") return content.filter((each) => typeof each === "string").join("\n");
  return JSON.stringify(content);
}

async function* frames(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const found = (rest + value).split("\n\n");
      rest = found.pop();
      for (const frame of found) {
        const fields = Object.fromEntries(frame.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
        if (!fields.retry) yield fields;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function withBody(method, body) {
  return { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    if (signal?.aborted) return resolve();
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", done);
  });
}
