"""/admin/v1/session: sign in with a token, read who is signed in, sign out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from tidegate.admin.models.base import ResponseModel
from tidegate.admin.sessions import csrf_token
from tidegate.admin.tokens import Principal
from tidegate.doors.admin.common import Caller
from tidegate.doors.admin.session_cookies import SESSION_PATH, SessionCookies


class SessionRead(ResponseModel):
    """Who is signed in; all is null if nobody is. `csrf_token` is null for a bearer token, which needs none."""

    name: str | None
    role: str | None
    csrf_token: str | None
    idle_s: float
    demo: bool


def session_routes(cookies: SessionCookies) -> APIRouter:
    """The routes of the session. They are for the console alone, so the OpenAPI description leaves them out."""
    routes = APIRouter(prefix=SESSION_PATH, include_in_schema=False)

    @routes.post("", status_code=201)
    async def sign_in(request: Request, response: Response, caller: Caller) -> SessionRead:
        session = await cookies.sessions.create(request.scope["state"]["token"])
        response.headers["Set-Cookie"] = cookies.cookie(session.secret)
        return _read(response, caller, session.csrf_token)

    @routes.get("")
    async def read(request: Request, response: Response) -> SessionRead:
        state = request.scope["state"]
        secret = state.get("session")
        return _read(response, state.get("principal"), None if secret is None else csrf_token(secret))

    @routes.delete("", status_code=204)
    async def sign_out(request: Request, response: Response, _: Caller) -> None:
        secret = request.scope["state"].get("session")
        if secret is not None:
            await cookies.sessions.end(secret)
        response.headers["Set-Cookie"] = cookies.cookie(None)

    def _read(response: Response, caller: Principal | None, csrf: str | None) -> SessionRead:
        response.headers["Cache-Control"] = "no-store"
        name, role = (None, None) if caller is None else (caller.name, caller.role)
        demo = cookies.demo_token is not None
        return SessionRead(name=name, role=role, csrf_token=csrf, idle_s=cookies.idle_s, demo=demo)

    return routes
