/** Types of agx.js. */

export type Outcome = "completed" | "cancelled" | "failed" | "lost";

export class AgxError extends Error {
  /** A code of the error catalogue, or one of the client's own, such as `network_error`. */
  readonly code: string;
  /** The HTTP status; 0 where no answer came. */
  readonly status: number;
  constructor(code: string, message?: string, status?: number);
}

/** An entry of a session's stream. */
export interface AgxEvent {
  id?: string;
  type: "begin" | "event" | "info" | "error" | "resume" | "end" | (string & {});
  origin: string;
  body: Record<string, any>;
}

/** A part of a message, of the stored conversation or of a live run; `gap` stands where events are missing. */
export interface Part {
  part_kind: "user-prompt" | "text" | "thinking" | "tool-call" | "tool-return" | "retry-prompt" | "file" | "gap" | (string & {});
  content?: unknown;
  tool_name?: string;
  tool_call_id?: string;
  args?: unknown;
  [key: string]: unknown;
}

/** A tool call that waits: for a yes or a no, or for the result of a call that is made elsewhere. */
export interface WaitingCall {
  session_id: string;
  run_id: string;
  call_id: string;
  tool: string;
  args: Record<string, unknown>;
  kind: "approval" | "result";
  /** ISO 8601. */
  since: string;
  /** When the call is denied; null where it waits for any time. */
  expires: string | null;
}

export interface DecisionOptions {
  /** Take the place of the model's arguments. */
  args?: Record<string, unknown>;
  /** Of a call that is made elsewhere. */
  result?: unknown;
  /** Makes a repeat harmless. */
  key?: string;
}

export interface State {
  readonly status: "loading" | "ready" | "running" | "reconnecting";
  readonly parts: readonly Part[];
  /** The calls with which the latest run ended. */
  readonly pending: readonly WaitingCall[];
  /** How the last run ended; null while one is live, and where its events are no longer retained. */
  readonly outcome: Outcome | null;
  /** What to show: a sentence and its code. */
  readonly error: AgxError | null;
  readonly runId: string | null;
}

export interface Options {
  /** Headers of each request, such as a token. */
  headers?: () => Record<string, string> | Promise<Record<string, string>>;
  fetch?: typeof globalThis.fetch;
  /** Seconds without an event after which the connection is made again. Default 20. */
  silence?: number;
  /** Seconds between two looks for a run that another page has started. Default 5. */
  poll?: number;
  /** Seconds before the second attempt to connect; doubled each time, up to 15. Default 1. */
  backoff?: number;
}

export interface Conversation {
  messages: { parts: Part[]; [key: string]: unknown }[];
  run_id: string | null;
  live: boolean;
  last_event_id: string | null;
  /** How the latest run ended; `lost` where its process died. */
  outcome: Outcome | null;
}

export interface StoredConversation {
  session_id: string;
  title: string;
  saved_at: string;
}

export interface Follower {
  readonly state: State;
  start(prompt: string): Promise<boolean>;
  retry(): Promise<boolean>;
  cancel(): Promise<boolean>;
  steer(text: string): Promise<boolean>;
  approve(callId: string, options?: DecisionOptions): Promise<boolean>;
  deny(callId: string, options?: Pick<DecisionOptions, "key">): Promise<boolean>;
  close(): void;
}

export interface Session {
  readonly id: string;
  read(): Promise<Conversation>;
  start(prompt: string): Promise<string>;
  cancel(): Promise<boolean>;
  steer(text: string, key?: string): Promise<void>;
  pending(): Promise<WaitingCall[]>;
  /** The run that goes on; null while other calls of the run wait. */
  approve(callId: string, options?: DecisionOptions): Promise<string | null>;
  deny(callId: string, options?: Pick<DecisionOptions, "key">): Promise<string | null>;
  events(options?: {
    after?: string;
    signal?: AbortSignal;
    /** Called with null where a connection stands, and with the error where one fails. */
    onConnection?: (error: AgxError | null) => void;
  }): AsyncGenerator<AgxEvent, void, void>;
  follow(onState: (state: State) => void): Follower;
}

export interface Client {
  session(id: string): Session;
  conversations(page?: { limit?: number; offset?: number }): Promise<StoredConversation[]>;
  live(): Promise<string[]>;
  pending(): Promise<WaitingCall[]>;
}

export const INITIAL: State;
export function connect(prefix: string, options?: Options): Client;
export function apply(parts: readonly Part[], event: AgxEvent): readonly Part[];
export function textOf(part: Part | undefined): string;
