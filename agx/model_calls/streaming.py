"""Whether a model request can be streamed with the same outcome as a request that is not.

Hooking the event stream turns each request of `agent.run()` into a streamed one. For a plain model that changes
nothing but the time of arrival. It changes the outcome where something looks at the complete response (a fallback that
rejects a response, a hook that asks for a retry), where the model can't stream, or where it answers a streamed request
differently. A request that is not known to end in the same way is not streamed (issue 12, "Observing changes nothing").
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic_ai.capabilities import AbstractCapability, CombinedCapability, Hooks, Instrumentation, WrapperCapability
from pydantic_ai.models import Model
from pydantic_ai.models.concurrency import ConcurrencyLimitedModel
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.instrumented import InstrumentedModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.models.wrapper import WrapperModel

from .private_api import has_registered_hook

logger = logging.getLogger("agx")

# A fallback judges a complete response and recovers from an error in mid-answer; a streamed one does neither.
# TestModel counts the tokens of a tool call only when it does not stream.
_NEVER_ALIKE = (FallbackModel, TestModel)
_RAISES_WHEN_STREAMED = "pydantic_ai.models.mcp_sampling"  # its import needs a package of its own
_TRANSPARENT = (WrapperModel, InstrumentedModel, ConcurrencyLimitedModel)

# The hooks that see a model request, choose its model, or may recover from its failure: after a stream that broke, the
# messages have a partial answer.
_REQUEST_HOOKS = (
    "get_model",
    "get_wrapper_model",
    "before_model_request",
    "prepare_model_request",
    "wrap_model_request",
    "after_model_request",
    "on_model_request_error",
    "wrap_node_run",
    "on_node_run_error",
)
# pydantic-ai's own capabilities use these to edit messages and parameters, in the same way for both kinds of request.
_ALIKE_IN_PYDANTIC_AI = ("before_model_request", "prepare_model_request")
# Classes whose hooks change nothing by themselves.
_NEUTRAL = (AbstractCapability, CombinedCapability, WrapperCapability, Instrumentation, Hooks)


def find_obstacle(model: object, root: AbstractCapability[Any] | None) -> str | None:
    """Return the name of what could make a streamed request end differently, or None where nothing could.

    Args:
        model: the model that the run uses.
        root: the run's capabilities, as `RunContext.root_capability` has them.
    """
    if root is None:
        return "unknown capabilities"
    for capability in _leaves(root):
        if _judges_requests(capability):
            return type(capability).__name__
    return _find_model_obstacle(model)


def _find_model_obstacle(model: object) -> str | None:
    while isinstance(model, WrapperModel):
        if not _is_transparent(type(model)):
            return type(model).__name__
        model = model.wrapped
    if isinstance(model, FunctionModel):
        # Two functions are two answers. With the one for streams alone there is nothing else that could answer.
        alike = model.function is None
    else:
        alike = isinstance(model, Model) and _answers_alike(type(model))
    return None if alike else type(model).__name__


@lru_cache(maxsize=1_000)
def _is_transparent(kind: type) -> bool:
    return all(_definer(kind, method) in _TRANSPARENT for method in ("request", "request_stream"))


@lru_cache(maxsize=1_000)
def _answers_alike(kind: type) -> bool:
    # A subclass that overrides only one of the two methods answers the two kinds of request differently.
    return (
        not issubclass(kind, _NEVER_ALIKE)
        and kind.__module__ != _RAISES_WHEN_STREAMED
        and _definer(kind, "request_stream") is not Model
        and _definer(kind, "request") is _definer(kind, "request_stream")
    )


def _leaves(capability: AbstractCapability[Any]) -> Iterator[AbstractCapability[Any]]:
    """Yield a capability and those inside it."""
    if isinstance(capability, CombinedCapability):
        for inner in capability.capabilities:
            yield from _leaves(inner)
    elif isinstance(capability, WrapperCapability):
        yield from _leaves(capability.wrapped)
    yield capability


def _judges_requests(capability: AbstractCapability[Any]) -> bool:
    """Return whether a capability sees model requests in a way that may depend on how they are sent."""
    may_differ, registrable = _find_request_hooks(type(capability))
    return may_differ or (isinstance(capability, Hooks) and has_registered_hook(capability, registrable))


@lru_cache(maxsize=1_000)
def _find_request_hooks(kind: type) -> tuple[bool, tuple[str, ...]]:
    """Return whether a class has a hook that may differ, and the hooks that do if a function is registered."""
    definers = {hook: _definer(kind, hook) for hook in _REQUEST_HOOKS}
    return (
        any(_may_differ(definer, hook) for hook, definer in definers.items()),
        tuple(hook for hook, definer in definers.items() if definer is Hooks),
    )


def _may_differ(definer: type | None, hook: str) -> bool:
    if definer is None or definer in _NEUTRAL:
        return False
    package = definer.__module__.partition(".")[0]
    return package != "agx" and not (package == "pydantic_ai" and hook in _ALIKE_IN_PYDANTIC_AI)


def _definer(kind: type, name: str) -> type | None:
    """Return the class that a method comes from; None for a hook that the installed pydantic-ai does not have."""
    return next((cls for cls in kind.__mro__ if name in vars(cls)), None)


@lru_cache(maxsize=1_000)
def report_obstacle(agent: str, obstacle: str) -> None:
    """Log, once per agent and cause, why listeners get complete answers and no tokens."""
    logger.info(
        "agx: the answers of agent %r reach listeners complete, not token by token: a streamed request could end "
        "differently because of %s (docs/how-to/streaming.md)",
        agent,
        obstacle,
    )
