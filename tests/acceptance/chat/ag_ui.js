// Drives AG-UI's official client as a test tells it: `ask THREAD TEXT [GIVEN]`, `decide THREAD RESUME`,
// `answer THREAD RESULTS GIVEN`, `join THREAD` or `cancel THREAD`. GIVEN is JSON, the front end's tools and state;
// RESUME is JSON, the decisions on what interrupted the thread; RESULTS is JSON, by call. The last two join it first.
// Prints each event as it comes, and at the end the messages and the state that the client has put together.
import { randomUUID } from "@ag-ui/client";
import { AgxAgent } from "./agent.js";

const [url, token, command, threadId, content, given = "{}"] = process.argv.slice(2);
const { tools, state } = JSON.parse(given);
const agent = new AgxAgent({ url, threadId, initialState: state, headers: { Authorization: `Bearer ${token}` } });
const print = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const watcher = { onEvent: ({ event }) => print(event), onRunFailed: ({ error }) => print({ failed: String(error) }) };

if (command === "cancel") {
  print(await (await agent.cancelRun()).json());
} else if (command === "ask") {
  agent.addMessage({ id: randomUUID(), role: "user", content });
  await agent.runAgent({ tools }, watcher);
} else if (command === "decide") {
  await agent.connectAgent();
  await agent.runAgent({ resume: JSON.parse(content) }, watcher);
} else if (command === "answer") {
  await agent.connectAgent();
  for (const [toolCallId, result] of Object.entries(JSON.parse(content)))
    agent.addMessage({ id: randomUUID(), role: "tool", toolCallId, content: result });
  await agent.runAgent({ tools }, watcher).catch(() => {});
} else {
  await agent.connectAgent({}, watcher);
}
print({ messages: agent.messages, state: agent.state });
