"""The web process, without an agent: login, one page, and the routes that submit, follow, steer and cancel runs."""

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

import agx
from agx.web import graceful_shutdown, make_router

from .store import engine, redis, sessions

SECRET = os.environ["SHOP_SECRET"]  # signs the tokens: the same in all web processes, at least 32 bytes
PER_MINUTE = int(os.environ.get("SHOP_PER_MINUTE", "20"))  # questions of one user
ORIGINS = os.environ.get("SHOP_ORIGINS", "http://localhost:5173").split(",")  # of pages that another server serves
# Yours come from a database, with hashed passwords, or from an identity provider that issues the tokens.
USERS = {"ada": ("acme", "lamp"), "bob": ("acme", "desk"), "eve": ("globex", "sofa")}  # tenant and password


class Login(BaseModel):
    user: str
    password: str


async def authorize(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]
) -> tuple[str, str]:
    """Return tenant and user of the token; refuse a user who asks too often."""
    try:
        claims = jwt.decode(credentials.credentials, SECRET, ["HS256"], options={"require": ["exp", "sub", "tenant"]})
    except jwt.InvalidTokenError:
        raise HTTPException(401, "the token is wrong or too old") from None
    if request.url.path.endswith("/runs"):
        await limit(f"shop:asked:{claims['tenant']}:{claims['sub']}")
    return claims["tenant"], claims["sub"]


async def limit(key: str) -> None:
    """Count a question; in Redis, since a user's requests reach any web process."""
    async with redis.pipeline() as pipeline:
        pipeline.set(key, 0, ex=60, nx=True)
        pipeline.incr(key)
        _, asked = await pipeline.execute()
    if asked > PER_MINUTE:
        raise HTTPException(429, f"more than {PER_MINUTE} questions in a minute")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await sessions.create_table()
    agx.configure(agx.Config(redis=redis, service_name="shop-web"))
    # At SIGTERM open event streams are closed, and pages connect to another web process. The workers' runs go on.
    async with redis, graceful_shutdown():
        yield
    await engine.dispose()


app = FastAPI(title="Shop", lifespan=lifespan)
app.add_middleware(
    CORSMiddleware,
    allow_origins=ORIGINS,
    allow_methods=["GET", "POST"],
    allow_headers=["Agx-Client", "Authorization", "Content-Type", "Last-Event-ID"],
)
app.include_router(make_router("support", authorize=authorize, sessions=sessions), prefix="/api")


@app.post("/login")
async def login(given: Login) -> dict[str, str]:
    """Return a token for eight hours."""
    tenant, password = USERS.get(given.user, ("", None))
    if given.password != password:
        raise HTTPException(401, "unknown user or wrong password")
    claims = {"sub": given.user, "tenant": tenant, "exp": int(time.time()) + 8 * 3_600}
    return {"token": jwt.encode(claims, SECRET, "HS256"), "tenant": tenant}


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))
