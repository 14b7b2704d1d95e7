"""A real browser without windows: Chromium, and a page in it with the server that the page comes from."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from typing import Any

import pytest

from tests.moments import wait_until
from tests.servers.ports import HOST

_PAGE = """<!doctype html><title>page</title><script type="module">
const report = (value) => fetch("/report", {method: "POST", body: JSON.stringify(value)});
try { report(await (async () => { %s })()); } catch (error) { report({error: String(error)}); }
</script>"""


def find_chromium() -> str:
    """Find the browser for a test, which is skipped if there is none.

    Returns:
        The path of `chromium-headless-shell`, or else of `chromium`: it makes a window for each page even where none is shown,
        which takes 1 s of CPU time.
    """
    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed: it comes with the Debian package chromium-headless-shell")
    return program


class Page:
    """A page of an origin of its own, at `origin`; a context manager that serves it."""

    def __init__(self) -> None:
        self.reported: list[Any] = []
        self._script = ""
        page = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = (_PAGE % page._script).encode() if self.path == "/" else b""
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                page.reported.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.origin = f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Page:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def run(self, script: str) -> Any:
        """Open the page in a browser that was started for it, and wait for what its script returns.

        Args:
            script: the body of an async function in JavaScript.

        Returns:
            What it returned; `{"error": text}` if it threw.
        """
        program = find_chromium()
        self._script = script
        self.reported.clear()
        profile = tempfile.mkdtemp(prefix="tidegate-browser-")
        arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}")
        process = subprocess.Popen(
            [program, *arguments, self.origin + "/"],
            env={**os.environ, "HOME": profile},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return wait_until(lambda: self.reported, 120, "the page reports")[0]
        finally:
            # Its children are in its own group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(profile, ignore_errors=True)
