"""Log-ins behind nginx as it is shipped: it opens a hold before an attempt, and settles it by the status of the response."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx

from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.servers.nginx import Nginx
from tests.servers.ports import HOST, free_port

SHIPPED = Path(__file__).parents[2] / "deploy" / "nginx"
POLICY = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  name = "log-in"
  endpoint = "/login"
  methods = ["POST"]
  subject = "ip"
  limits = ["3/day"]
  count = "failures"
[anonymous]
tier = "free"
"""


def test_failed_attempts_count_and_others_do_not(tmp_path: Path, serve: Callable[..., Serve]) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    port, api = free_port(), free_port()
    tidegate = serve()
    http = f"""
    upstream tidegate {{ server {HOST}:{tidegate.port} max_fails=0; keepalive 4; }}
    server {{
        listen {HOST}:{api};
        location = /login {{
            if ($arg_password = "right") {{ return 200 "welcome"; }}
            if ($arg_password = "broken") {{ return 500 "an error of the app"; }}
            if ($arg_password = "forbidden") {{ return 403 "forbidden by the app"; }}
            return 401 "wrong password";
        }}
    }}
    server {{
        listen {HOST}:{port};
        include snippets/tidegate-attempts.conf;
        location = /login {{
            set $tidegate_attempt /login;
            include snippets/tidegate-attempt.conf;
            proxy_pass http://{HOST}:{api};
        }}
    }}
    """
    files = {f"snippets/{name}": (SHIPPED / name).read_text() for name in ("tidegate-attempts.conf", "tidegate-attempt.conf")}
    nginx = Nginx((SHIPPED / "attempts.conf").read_text() + http, port, files)
    with nginx, httpx.Client(timeout=PATIENCE_S) as client:

        def log_in(password: str) -> httpx.Response:
            return client.post(f"http://{HOST}:{port}/login?password={password}")

        def left() -> int:
            body = {"path": "/login", "method": "POST", "ip": "127.0.0.1", "cost": 0}
            found: int = client.post(f"{tidegate.url}/v1/check", json=body).json()["remaining"]
            return found

        assert [log_in("right").status_code for _ in range(5)] == [200] * 5
        assert log_in("broken").status_code == 500
        wait_until(lambda: left() == 3, what="no attempt is in progress, and none failed")
        assert (log_in("guess").text, log_in("forbidden").text) == ("wrong password", "forbidden by the app")
        wait_until(lambda: left() == 1, what="two failures")
        assert [log_in("right").status_code for _ in range(3)] == [200] * 3
        wait_until(lambda: left() == 1, what="successes do not count")
        assert log_in("guess").status_code == 401
        wait_until(lambda: left() == 0, what="three failures")
        denied = log_in("right")
        assert (denied.status_code, denied.json()["error"]["code"]) == (429, "RATE_LIMIT_EXCEEDED")
        assert int(denied.headers["retry-after"]) > 0
        tidegate.stop()
        away = log_in("right")
        assert (away.status_code, away.headers["x-tidegate-error"]) == (503, "LIMITER_UNAVAILABLE")
