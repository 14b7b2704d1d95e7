"""A Flask app that asks a Tidegate server before each request, and goes on serving when the limiter is away.

pip install 'tidegate[client]' flask
TIDEGATE_POLICY__FILE=app.policy.toml tidegate serve &
granian --interface wsgi --port 8000 flask_app:app
curl -i http://127.0.0.1:8000/api/items -H 'X-API-Key: demo-free-key-0001'
"""

import os
from urllib.parse import quote

from flask import Flask, Response, g, request
from flask.typing import ResponseReturnValue

from tidegate import TidegateError
from tidegate.client import Client

limiter = Client(
    os.environ.get("TIDEGATE_URL", "http://127.0.0.1:8080").split(","),
    deadline_s=float(os.environ.get("TIDEGATE_DEADLINE_S", "0.25")),
    on_failure="allow",
)
app = Flask(__name__)


@app.before_request
def ask_the_limiter() -> ResponseReturnValue | None:
    """Let the request pass, or answer it with 429; with 400, 401 or 403 where the limiter refuses it."""
    # WSGI hands over a decoded path; the limiter wants it as it is sent.
    path = quote(request.path, safe="/:@!$&'()*+,=~-._")
    try:
        answer = limiter.check(path, request.method, api_key=request.headers.get("X-API-Key"), ip=request.remote_addr)
    except TidegateError as error:
        return {"error": {"code": error.code, "message": error.message}}, error.status
    g.limit_headers = answer.headers
    if answer.allowed:
        return None
    return {"error": {"code": "RATE_LIMIT_EXCEEDED", "retry_after": answer.retry_after}}, answer.status


@app.after_request
def tell_what_is_left(response: Response) -> Response:
    """Give the limiter's headers on, whether the request passed or not."""
    for name, value in g.get("limit_headers", ()):
        response.headers[name] = value
    return response


@app.get("/api/items")
def items() -> list[str]:
    return ["tide", "gate"]


@app.post("/login")
def login() -> dict[str, str]:
    return {"welcome": "back"}
