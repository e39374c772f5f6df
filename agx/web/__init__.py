"""The web: FastAPI routers that start, follow and cancel runs, plain or in a chat front end's protocol."""

try:
    from .ag_ui import make_ag_ui_router
    from .router import make_router
    from .shutdown import graceful_shutdown
    from .vercel_ai import make_vercel_ai_router
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "ag_ui"):
        raise
    raise ImportError(
        f"agx.web needs {error.name}, which is not installed: pip install 'opale-agent-stream[web]'"
    ) from error

__all__ = ["graceful_shutdown", "make_ag_ui_router", "make_router", "make_vercel_ai_router"]
