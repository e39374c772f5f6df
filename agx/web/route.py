"""The routes of all routers: a request's body is bounded, and each error is answered with a sentence and a code."""

# No `from __future__ import annotations`: FastAPI evaluates annotations.

import json
import re
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from ..error_codes import CLIENT_OUTDATED, REQUEST_TOO_LARGE, REQUEST_UNREADABLE, ErrorCode
from ..errors import (
    BranchError,
    ConversationChangedError,
    JobError,
    NotPendingError,
    QueueFullError,
    RedisUnavailableError,
    RunUnknownError,
    SessionBusyError,
    SessionConflictError,
    SessionUnknownError,
    TextError,
)
from ..runs.outcome import classify_error

# Versions of `agx.js` that no longer work with these routes. None so far: 0 was never released.
OUTDATED_CLIENTS = frozenset({"0"})
_REFUSALS = (
    BranchError,
    SessionBusyError,
    SessionConflictError,
    SessionUnknownError,
    ConversationChangedError,
    QueueFullError,
    JobError,
    RunUnknownError,
    NotPendingError,
    TextError,
    RedisUnavailableError,
)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Responses = dict[int | str, dict[str, Any]]
Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


class Problem(BaseModel):
    """Why a request was refused; `code` is a row of the error catalogue (an answer of `authorize` has none)."""

    detail: str
    code: str | None = None


class RefusedError(HTTPException):
    """A request that is refused: a row of the catalogue, and what exactly is wrong where that is known."""

    def __init__(self, kind: ErrorCode, detail: str | None = None, *, status: int | None = None) -> None:
        super().__init__(status or kind.http_status or 500, detail or kind.sentence)
        self.kind = kind

    def to_response(self) -> JSONResponse:
        """Return the answer; a lone surrogate that a message quotes is replaced."""
        detail = self.detail.encode("utf-8", "replace").decode()
        return JSONResponse({"detail": detail, "code": self.kind.code}, self.status_code)


def make_api_router(max_request: int, responses: Responses, lifespan: Lifespan | None = None) -> APIRouter:
    """Return a router whose routes read at most `max_request` bytes of a body, and answer errors with a `Problem`."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def answer(request: Request) -> Response:
                if request.headers.get("agx-client") in OUTDATED_CLIENTS:
                    return RefusedError(CLIENT_OUTDATED).to_response()
                try:
                    return await handle(_BoundedRequest(request, max_request))
                except RefusedError as error:
                    return error.to_response()
                except RequestValidationError as error:
                    detail = f"{REQUEST_UNREADABLE.sentence[:-1]}: {describe_fields(error.errors())}"
                    return RefusedError(REQUEST_UNREADABLE, detail).to_response()
                except _REFUSALS as error:
                    # The catalogue's sentence: the exception's own text may hold addresses.
                    return RefusedError(classify_error(error)).to_response()

            return answer

    def name_operation(route: APIRoute) -> str:
        """Return the prefix that the app has given the router, and the function's name: `api_start_run`."""
        own = [one.path for one in router.routes if isinstance(one, APIRoute) and one.endpoint is route.endpoint]
        return "_".join([*re.findall(r"\w+", route.path.removesuffix(own[0] if own else route.path)), route.name])

    router = APIRouter(
        route_class=Route, responses=responses, lifespan=lifespan, generate_unique_id_function=name_operation
    )
    return router


def describe_fields(errors: Sequence[Any]) -> str:
    """Return what is wrong with the first few fields, without their values: those may be anything."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors[:5])


class _BoundedRequest(Request):
    """A request whose body has a limit, and counts as invalid JSON whatever makes it unreadable."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        super().__init__(request.scope, request.receive)
        self._max_bytes = max_bytes
        self._whole: bytes | None = None

    async def body(self) -> bytes:
        """Return the body; raises RefusedError as soon as it is too large, whatever size was announced."""
        if self._whole is None:
            parts, size = [], 0
            async for part in self.stream():
                parts.append(part)
                size += len(part)
                if size > self._max_bytes:
                    raise RefusedError(REQUEST_TOO_LARGE)
            self._whole = b"".join(parts)
        return self._whole

    async def json(self) -> Any:
        """Return the body's JSON; raises JSONDecodeError also where its encoding or its depth can't be read.

        A lone half of a surrogate pair is no text: no model and no store could take it.
        """
        body = await self.body()
        try:
            value = json.loads(body)
            if _SURROGATE.search(body):
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):
            raise json.JSONDecodeError("not readable", "", 0) from None
        return value
