"""The agents, their tools, and the worker that runs them: `agx worker shop.agents:worker`."""

import logging
import os
from dataclasses import dataclass

from pydantic_ai import Agent, DeferredToolRequests, ModelRetry, RunContext

import agx

from .scripted import assistant_model, stylist_model
from .store import redis, sessions

MODEL = os.environ.get("MODEL")  # such as openai:gpt-4o-mini; the scripted model needs no key
PAGES = {
    1: "lamps. The oak lamp stands on three legs, and costs 89 euros. The steel lamp bends, and costs 49.",
    2: "desks. The plain desk has one drawer and no screws, and costs 240 euros. The tall desk is to stand at.",
    3: "chairs. The round chair turns, the square chair does not, and both cost 120 euros with a cushion of wool.",
    4: "shelves. They are made to measure, from pine or oak, and two people carry them up your stairs within a week.",
}

log = logging.getLogger("shop")


@dataclass(kw_only=True)
class ShopDeps(agx.Deps):
    """What the tools know of a run: the tenant and the user come from the job, never from the model."""

    tenant: str

    def get_scope_id(self) -> str:
        return self.tenant


support = Agent(
    MODEL or assistant_model,
    name="support",
    deps_type=ShopDeps,
    output_type=[str, DeferredToolRequests],  # a run may end with calls that wait for the user
    instructions="You help customers of a furniture shop. Read the catalogue before you name a price.",
    defer_model_check=True,
)
# With the capability the stylist's runs have metrics and spans of their own, below the tool that starts them.
stylist = Agent(
    MODEL or stylist_model,
    name="stylist",
    instructions="You say in one sentence what goes well with a piece of furniture.",
    capabilities=[agx.AgxCapability()],
    defer_model_check=True,
)


@support.tool_plain(metadata={"on_resume": "retry"})  # it only reads: it may run again when its process died
async def read_catalogue(page: int) -> str:
    """Return a page of the catalogue; the first is 1."""
    if page not in PAGES:
        raise ModelRetry(f"there is no page {page}: the last one is {len(PAGES)}")
    return f"Page {page} of {len(PAGES)}: {PAGES[page]}"


@support.tool(metadata={"on_resume": "retry"})
async def ask_stylist(ctx: RunContext[ShopDeps], question: str) -> str:
    """Ask the stylist what goes with a piece of furniture."""
    return (await stylist.run(question, usage=ctx.usage)).output


@support.tool(requires_approval=True, metadata={"expires_in": 86_400})
async def place_order(ctx: RunContext[ShopDeps], item: str, quantity: int) -> str:
    """Order something for the user."""
    # The call's id is the same in each attempt: the order system takes it as idempotency key.
    log.info("order %s: %d x %s for %s of %s", ctx.tool_call_id, quantity, item, ctx.deps.user_id, ctx.deps.tenant)
    return f"Ordered: {quantity} x {item}."


async def make_support(job: agx.Job) -> agx.Call:
    """Make a run from a job; called again for each attempt, in whatever worker."""
    log.info("process %d answers %s in chat %s", os.getpid(), job.user_id, job.session_id)
    deps = ShopDeps(tenant=job.scope_id, user_id=job.user_id, session_id=job.session_id)
    return agx.Call(sessions.open(job.scope_id, job.user_id, job.session_id), support, deps)


agx.configure(
    agx.Config(
        redis=redis,
        service_name="shop-worker",
        # How long a run stands still when its worker is killed. 15, the default, forgives longer pauses of a machine.
        lease_ttl=float(os.environ.get("SHOP_LEASE_TTL", "5")),
    )
)
worker = agx.Worker({"support": make_support}, at_once=20, per_scope=10)  # no tenant takes a whole worker
