"""A peer of the HTTP bench on Redis: FastAPI with `limits` and redis-py, under the same server and policy as Tidegate.

Callers are identified by their API key, and two limits hold at once, as in the bench's policy: one of the endpoint, one
over the day. The Redis server is the one at `REDIS_URL`.
"""

from __future__ import annotations

import os
import time

from fastapi import FastAPI, Request, Response
from limits import parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

A_MINUTE = parse("100000000/minute")
A_DAY = parse("900000000/day")

limiter = SlidingWindowCounterRateLimiter(RedisStorage(f"async+{os.environ['REDIS_URL']}", implementation="redispy"))
app = FastAPI()


@app.get("/v1/authorize", status_code=204)
async def authorize(request: Request) -> Response:
    """Allow or deny, with the headers of the limit that denied or, when none did, of the shortest."""
    api_key = request.headers.get("x-api-key") or (request.client.host if request.client else "")
    status, exceeded = 204, A_MINUTE
    for limit in (A_MINUTE, A_DAY):
        if not await limiter.hit(limit, api_key):
            status, exceeded = 429, limit
            break
    stats = await limiter.get_window_stats(exceeded, api_key)
    reset_at = 1 + stats.reset_time
    headers = {
        "X-RateLimit-Limit": str(exceeded.amount),
        "X-RateLimit-Remaining": str(stats.remaining),
        "X-RateLimit-Reset": str(reset_at),
        "Retry-After": str(int(reset_at - time.time())),
    }
    return Response(status_code=status, headers=headers)
