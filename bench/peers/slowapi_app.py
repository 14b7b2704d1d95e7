"""The peer of the HTTP bench: FastAPI with slowapi, memory storage, under the same server and with the same policy as Tidegate.

Callers are identified by their API key, and two limits hold at once, as in the bench's policy: one of the endpoint, one
over the day.
"""

from fastapi import FastAPI, Request, Response
from slowapi import Limiter
from slowapi.util import get_remote_address


def by_api_key(request: Request) -> str:
    """The API key, or the address of a caller without one."""
    return request.headers.get("x-api-key") or get_remote_address(request)


limiter = Limiter(key_func=by_api_key, headers_enabled=True)
app = FastAPI()
app.state.limiter = limiter


@app.get("/v1/authorize", status_code=204)
@limiter.limit("100000000/minute;900000000/day")
async def authorize(request: Request, response: Response) -> None:
    """Allow, with the limit headers."""
