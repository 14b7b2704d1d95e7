"""A FastAPI app that limits its callers itself: the middleware decides, and no limiter runs beside it.

    pip install tidegate fastapi granian
    granian --interface asgi --port 8000 fastapi_app:app
    curl -i http://127.0.0.1:8000/api/items -H 'X-API-Key: demo-free-key-0001'

With several processes, give all of them one Redis: TIDEGATE_COUNTERS__URL=redis://127.0.0.1:6379
"""

import os
from pathlib import Path

from fastapi import FastAPI
from starlette.types import Scope

from tidegate import RateLimitMiddleware


def cost(scope: Scope) -> int:
    """An export is as dear as three other requests."""
    return 3 if scope["path"] == "/api/export" else 1


app = FastAPI()
app.add_middleware(
    RateLimitMiddleware,
    policy=Path(__file__).with_name("app.policy.toml"),
    counters=os.environ.get("TIDEGATE_COUNTERS__URL", "memory://"),
    trusted_proxies=["127.0.0.1"],
    cost=cost,
)


@app.get("/api/items")
async def items() -> list[str]:
    return ["tide", "gate"]


@app.get("/api/export")
async def export() -> dict[str, int]:
    return {"items": 2}


@app.post("/login")
async def login() -> dict[str, str]:
    return {"welcome": "back"}
