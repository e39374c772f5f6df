/** A React hook for agx.js: `const { parts, status, error, start, cancel, steer, retry } = useAgx(client, sessionId)`. */

import { useCallback, useEffect, useRef, useState } from "react";
import { INITIAL } from "./agx.js";

/** Follow a session as long as the component is shown; `client` must be the same object at each rendering. */
export function useAgx(client, sessionId) {
  const [state, setState] = useState(INITIAL);
  const follower = useRef(null);
  useEffect(() => {
    setState(INITIAL);
    const followed = client.session(sessionId).follow(setState);
    follower.current = followed;
    return () => followed.close();
  }, [client, sessionId]);
  const start = useCallback((prompt) => follower.current.start(prompt), []);
  const cancel = useCallback(() => follower.current.cancel(), []);
  const steer = useCallback((text) => follower.current.steer(text), []);
  const retry = useCallback(() => follower.current.retry(), []);
  const approve = useCallback((callId, options) => follower.current.approve(callId, options), []);
  const deny = useCallback((callId, options) => follower.current.deny(callId, options), []);
  const score = useCallback((value, options) => follower.current.score(value, options), []);
  return { ...state, start, cancel, steer, retry, approve, deny, score };
}
