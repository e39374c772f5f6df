/** Types of agx-react.js. */

import type { Client, Follower, State } from "./agx.js";

export function useAgx(
  client: Client,
  sessionId: string,
): State & Pick<Follower, "start" | "cancel" | "steer" | "retry" | "approve" | "deny" | "score">;
