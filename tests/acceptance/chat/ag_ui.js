// Drives AG-UI's official client as a test tells it: `ask THREAD TEXT`, `decide THREAD RESUME`, `join THREAD` or
// `cancel THREAD`; RESUME is JSON, the decisions on what interrupted the thread, which is joined first.
// Prints each event as it comes, and at the end the messages that the client has put together.
import { randomUUID } from "@ag-ui/client";
import { AgxAgent } from "./agent.js";

const [url, token, command, threadId, content] = process.argv.slice(2);
const agent = new AgxAgent({ url, threadId, headers: { Authorization: `Bearer ${token}` } });
const print = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const watcher = { onEvent: ({ event }) => print(event), onRunFailed: ({ error }) => print({ failed: String(error) }) };

if (command === "cancel") {
  print(await (await agent.cancelRun()).json());
} else if (command === "ask") {
  agent.addMessage({ id: randomUUID(), role: "user", content });
  await agent.runAgent({}, watcher);
} else if (command === "decide") {
  await agent.connectAgent();
  await agent.runAgent({ resume: JSON.parse(content) }, watcher);
} else {
  await agent.connectAgent({}, watcher);
}
print({ messages: agent.messages });
