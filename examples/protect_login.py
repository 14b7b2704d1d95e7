"""A log-in that cannot be guessed: failures are counted by address and by user, also those of parallel guesses.

    pip install tidegate fastapi granian
    granian --interface asgi --port 8000 protect_login:app
    curl -i http://127.0.0.1:8000/login -d '{"user": "ann", "password": "guess"}' -H 'Content-Type: application/json'

With several processes, give all of them one Redis: TIDEGATE_COUNTERS__URL=redis://127.0.0.1:6379
"""

import asyncio
import hmac
import os
from pathlib import Path

from fastapi import FastAPI, Response
from pydantic import BaseModel

from tidegate import Check, Gate, RateLimitMiddleware

PASSWORDS = {"ann": "correct horse battery staple"}

app = FastAPI()
gate = Gate.from_policy(
    Path(__file__).with_name("protect_login.policy.toml"),
    counters=os.environ.get("TIDEGATE_COUNTERS__URL", "memory://"),
)
# Failures by address: the middleware sees who asks, and settles each attempt by the status of its response.
app.add_middleware(RateLimitMiddleware, gate=gate)


class Credentials(BaseModel):
    """Who logs in."""

    user: str
    password: str


async def is_right(credentials: Credentials) -> bool:
    """Check a password; a real check is as slow."""
    await asyncio.sleep(0.05)
    return hmac.compare_digest(PASSWORDS.get(credentials.user, "").encode(), credentials.password.encode())


@app.post("/login")
async def login(credentials: Credentials, response: Response) -> dict[str, str]:
    """Failures by user: only the app knows whose password it is, so the app opens and settles this hold."""
    user = credentials.user.casefold()[:256]
    attempt = await gate.holds.open(Check.of("/login/user", "POST", attributes={"user": user}))
    if attempt.hold is None:
        response.status_code = 429
        response.headers["Retry-After"] = str(-(-(attempt.decision.retry_after_us or 1_000_000) // 1_000_000))
        return {"error": "too many failures of this user"}
    right = False
    try:
        right = await is_right(credentials)
    finally:
        await gate.holds.settle(attempt.hold, 0 if right else 1, success=right)
    if not right:
        response.status_code = 401
        return {"error": "user or password is wrong"}
    return {"welcome": user}
