"""Type-checked, not run: the public API as a service uses it, by its public names only."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic_ai import Agent
from redis.asyncio import Redis

import agx


@dataclass(kw_only=True)
class MyDeps(agx.Deps):
    tenant: int = 1

    def get_scope_id(self) -> int:
        return self.tenant


@dataclass
class MySession(agx.Session):
    id: str

    async def load(self) -> None:
        self.msgs_from_json(b"[]")

    async def save(self) -> None:
        stored: bytes = self.msgs_to_json()
        del stored


agent: Agent[MyDeps, str] = Agent("test", deps_type=MyDeps, capabilities=[agx.AgxCapability()])


async def use() -> None:
    agx.configure(agx.Config(Redis(), key_prefix="x", lease_ttl=5.0, retention=60.0))
    result = await agx.run(MySession(id="s"), agent, "Hello", deps=MyDeps(user_id=1, session_id="s"))
    answer: str = result.output
    del answer
    async for text in agx.listen(1, 1, "s"):
        text.upper()
    async for event in agx.listen(1, 1, "s", serialize=False, after="0-0"):
        print(event["body"])
    async for frame in agx.sse("scope", "user", "session", last_event_id=None, keep_alive=15):
        frame.encode()
    async for scope, user, session in agx.q(1, 1):
        del scope, user, session
    cancelled: bool = await agx.cancel(1, 1, "s")
    live: bool = await agx.is_live(1, 1, "s")
    del cancelled, live
    await agx.start(1, 1, "s")
    await agx.add(1, 1, "s", type="info", origin="mine", body={"a": 1})
    await agx.stop(1, 1, "s", grace_period=5)
    await agx.aclose(grace=1.0)
    try:
        pass
    except agx.AgxCanceledError as error:
        print(error.messages[-1].parts)
    except agx.AgxError:
        raise
