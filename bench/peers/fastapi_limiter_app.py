"""A peer of the HTTP bench on Redis: FastAPI with fastapi-limiter, under the same server and policy as Tidegate.

Callers are identified by their API key, and two limits hold at once, as in the bench's policy: one of the endpoint, one
over the day. The Redis server is the one at `REDIS_URL`. fastapi-limiter counts in fixed windows and sends no header but
`Retry-After`, on a denial: it does less than the others, and the figure favours it. 0.1.6 is the last version with a
Redis script of its own; later ones leave the store to another package.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI, Request
from fastapi_limiter import FastAPILimiter
from fastapi_limiter.depends import RateLimiter
from redis.asyncio import Redis


async def by_api_key(request: Request) -> str:
    """The API key, or the address of a caller without one."""
    return request.headers.get("x-api-key") or (request.client.host if request.client else "")


@contextlib.asynccontextmanager
async def connected(_: FastAPI) -> AsyncIterator[None]:
    """The limiter with its connections, as long as the app runs."""
    async with Redis.from_url(os.environ["REDIS_URL"]) as redis:
        await FastAPILimiter.init(redis, identifier=by_api_key)
        yield


app = FastAPI(lifespan=connected)


@app.get(
    "/v1/authorize",
    status_code=204,
    dependencies=[
        Depends(RateLimiter(times=100_000_000, minutes=1)),
        Depends(RateLimiter(times=900_000_000, hours=24)),
    ],
)
async def authorize() -> None:
    """Allow, once no limit has denied."""
