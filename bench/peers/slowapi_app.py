"""The peer of the HTTP bench: FastAPI with slowapi, memory storage, one limit, under the same server as Tidegate."""

from fastapi import FastAPI, Request, Response
from slowapi import Limiter
from slowapi.util import get_remote_address

limiter = Limiter(key_func=get_remote_address, headers_enabled=True)
app = FastAPI()
app.state.limiter = limiter


@app.get("/v1/authorize", status_code=204)
@limiter.limit("100000000/minute")
async def authorize(request: Request, response: Response) -> None:
    """Allow, with the limit headers."""
