"""`tidegate serve` with mutual TLS on all its listeners, and on unix sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.cases.doors import FREE, POLICY
from tests.conftest import Serve, free_port
from tests.integration.ratelimit_client import caller, health, request
from tests.moments import PATIENCE_S, wait_until
from tests.servers.certificates import Authority
from tests.servers.forked import REALLY_STARTED
from tests.servers.ports import HOST
from tests.servers.redis_server import RedisServer
from tidegate.client import Client
from tidegate.doors.grpc.messages import OK, SERVING

TOKEN = "a-token-of-an-operator"
CHECK = {"path": "/api/v1/a", "api_key": FREE, "cost": 0}
DESCRIPTOR = [("api_key", FREE), ("method", "GET"), ("path", "/api/v1/a")]


class Secured(Serve):
    """A server with mutual TLS whose certificate is replaced in tests.

    Args:
        directory: of the server.
    """

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory / "pki")
        self.cert, self.key = self.authority.issue("rotating", HOST)
        self.probes = free_port()
        (directory / "tidegate.policy.toml").write_text(POLICY)
        super().__init__(
            directory,
            log=directory / "log",
            grpc=True,
            TIDEGATE_ADMIN__TOKEN=TOKEN,
            TIDEGATE_SERVER__PROBES=f"{HOST}:{self.probes}",
            TIDEGATE_TLS__CERT=str(self.cert),
            TIDEGATE_TLS__KEY=str(self.key),
            TIDEGATE_TLS__CLIENT_CA=str(self.authority.ca),
            TIDEGATE_TLS__CLIENT_NAMES="client.tidegate.test, spiffe://tidegate.test/gateway",
        )
        self.url = f"http://{HOST}:{self.probes}"
        self.wait_ready()

    def context(self, cert: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Of a client that has the certificate that is allowed, or the given one."""
        context = ssl.create_default_context(cafile=self.authority.ca)
        context.load_cert_chain(*(cert or (self.authority.client_cert, self.authority.client_key)))
        return context

    def connection(self) -> http.client.HTTPSConnection:
        """To the data plane."""
        return http.client.HTTPSConnection(HOST, self.port, timeout=PATIENCE_S, context=self.context())

    def channel(self, cert: tuple[Path, Path] | None = None) -> grpc.Channel:
        """To the gRPC listener, on a connection of its own."""
        chain, key = cert or (self.authority.client_cert, self.authority.client_key)
        credentials = grpc.ssl_channel_credentials(self.authority.ca.read_bytes(), key.read_bytes(), chain.read_bytes())
        return grpc.secure_channel(f"{HOST}:{self.grpc_port}", credentials, options=[("grpc.use_local_subchannel_pool", 1)])

    def metric(self, name: str) -> float:
        """Of the listener for probes."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).rpartition(" ")[2])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    secured = Secured(tmp_path_factory.mktemp("secured"))
    yield secured
    secured.stop()


def checked(connection: http.client.HTTPSConnection) -> int:
    connection.request("POST", "/v1/check", json.dumps(CHECK))
    response = connection.getresponse()
    response.read()
    return response.status


def served_certificate(server: Secured, port: int) -> bytes:
    with (
        socket.create_connection((HOST, port), PATIENCE_S) as plain,
        server.context().wrap_socket(plain, server_hostname=HOST) as tls,
    ):
        return tls.getpeercert(True) or b""


def test_every_listener_answers_a_client_with_the_certificate(server: Secured) -> None:
    with contextlib.closing(server.connection()) as connection:
        assert checked(connection) == 200
    admin = f"https://{HOST}:{server.admin_port}/admin/v1/tiers"
    with httpx.Client(verify=server.context(), headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert client.get(admin).status_code == 200
    with server.channel() as channel:
        assert caller(channel)(request(DESCRIPTOR), timeout=PATIENCE_S).overall_code == OK
        assert health(channel) == SERVING
    with Client(
        f"https://{HOST}:{server.port}", ssl_context=server.context(), deadline_s=PATIENCE_S, on_failure="raise"
    ) as client:
        assert client.check("/api/v1/a", api_key=FREE, cost=0).allowed


def test_a_client_with_another_name_is_refused_by_every_listener(server: Secured) -> None:
    other = server.authority.issue("other", "other.tidegate.test")
    with httpx.Client(verify=server.context(other)) as client:
        for port in (server.port, server.admin_port):
            refused = client.get(f"https://{HOST}:{port}/health")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "CLIENT_NOT_ALLOWED")
    with server.channel(other) as channel:
        for call in (lambda: caller(channel)(request(DESCRIPTOR), timeout=PATIENCE_S), lambda: health(channel)):
            with pytest.raises(grpc.RpcError) as denied:
                call()
            assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
            assert "other.tidegate.test" in denied.value.details()  # type: ignore[attr-defined]


def test_a_client_without_a_certificate_is_refused_by_every_listener(server: Secured) -> None:
    without = ssl.create_default_context(cafile=server.authority.ca)
    with httpx.Client(verify=without) as client:
        for port in (server.port, server.admin_port):
            with pytest.raises(httpx.TransportError):
                client.get(f"https://{HOST}:{port}/health")
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://{HOST}:{port}/health")
    credentials = grpc.ssl_channel_credentials(server.authority.ca.read_bytes())
    for channel in (
        grpc.secure_channel(f"{HOST}:{server.grpc_port}", credentials),
        grpc.insecure_channel(f"{HOST}:{server.grpc_port}"),
    ):
        with channel, pytest.raises(grpc.RpcError) as refused:
            caller(channel)(request(DESCRIPTOR), timeout=PATIENCE_S)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_probes_are_plain_and_there_is_nothing_else_on_their_port(server: Secured) -> None:
    for path in ("/health", "/readyz", "/livez", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    assert httpx.head(f"{server.url}/readyz").content == b""
    assert httpx.get(f"{server.url}/health").json()["components"]["tls"]["status"] == "healthy"
    assert httpx.post(f"{server.url}/v1/check", json=CHECK).status_code == 404
    assert httpx.get(f"{server.url}/openapi.json").status_code == 404
    assert httpx.post(f"{server.url}/readyz").headers["allow"] == "GET, HEAD"


def test_certificates_are_replaced_under_open_connections_and_a_wrong_one_is_not_used(server: Secured) -> None:
    with contextlib.closing(server.connection()) as kept, server.channel() as channel:
        assert checked(kept) == 200
        assert caller(channel)(request(DESCRIPTOR), timeout=PATIENCE_S).overall_code == OK
        first = served_certificate(server, server.port)
        socket_before = kept.sock

        server.authority.issue("rotating", HOST)
        new = ssl.PEM_cert_to_DER_cert(server.cert.read_text()[: server.cert.read_text().index("-----END") + 25])
        for port in (server.port, server.admin_port, server.grpc_port):
            wait_until(lambda port=port: served_certificate(server, port) == new)  # type: ignore[misc]
        assert first != new
        assert server.metric("rate_limiter_tls_reloads_total") == 1

        server.key.write_text("not a key")
        wait_until(lambda: server.metric("rate_limiter_tls_reload_errors_total") == 1)
        report = httpx.get(f"{server.url}/health")
        assert report.status_code == 503
        assert report.json()["components"]["tls"]["reason"] == "TLS_CERTIFICATE (new files refused, previous ones in use)"
        assert "has no PEM private key" in (server.directory / "log").read_text()
        assert served_certificate(server, server.port) == new

        assert checked(kept) == 200
        assert kept.sock is socket_before, "the connection was not closed"
        assert caller(channel)(request(DESCRIPTOR), timeout=PATIENCE_S).overall_code == OK
        server.authority.issue("rotating", HOST)
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        assert server.metric('rate_limiter_tls_certificate_expiry_timestamp_seconds{file="cert"}') > 2e9


def test_handshakes_that_stall_do_not_stop_others(server: Secured) -> None:
    stalled = [socket.create_connection((HOST, server.port)) for _ in range(50)]
    try:
        with contextlib.closing(server.connection()) as connection:
            assert checked(connection) == 200
    finally:
        for each in stalled:
            each.close()


def test_commands_with_certificates(server: Secured) -> None:
    files = server.authority
    tls = ["--ca", str(files.ca), "--cert", str(files.client_cert), "--key", str(files.client_key)]
    url = f"https://{HOST}:{server.port}"
    refused = server.run("check", FREE, "GET", "/api/v1/a", "--url", url, *tls[:2])
    assert (refused.returncode, "with --cert and --key" in refused.stderr) == (2, True), refused.stderr
    listed = server.run("keys", "list", "--url", f"https://{HOST}:{server.admin_port}", "--json", *tls)
    assert (listed.returncode, len(json.loads(listed.stdout)) > 0) == (0, True), listed.stderr
    server.key.chmod(0o600)
    examined = server.run("doctor", "--json")
    found = {each["what"]: each for each in json.loads(examined.stdout)}
    assert found["tls"]["ok"]
    assert found["server tls"]["ok"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """One whose path is short enough for a unix socket."""
    short = Path("/tmp") / f"tidegate-{free_port()}"
    short.mkdir(mode=0o700)
    yield short
    shutil.rmtree(short)


def over(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost")


def test_workers_share_unix_sockets(directory: Path, redis_server: RedisServer) -> None:
    (directory / "tidegate.policy.toml").write_text(POLICY)
    data, admin = directory / "http.sock", directory / "admin.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(data))  # as a killed process leaves it
    probes = free_port()
    environment: dict[str, Any] = {
        "TIDEGATE_SERVER__HTTP": f"unix:{data}",
        "TIDEGATE_SERVER__ADMIN": f"unix:{admin}",
        "TIDEGATE_SERVER__PROBES": f"{HOST}:{probes}",
        "TIDEGATE_SERVER__UNIX_MODE": "0600",
        "TIDEGATE_SERVER__WORKERS": "2",
        "TIDEGATE_COUNTERS__URL": redis_server.url,
        "TIDEGATE_ADMIN__TOKEN": TOKEN,
        **REALLY_STARTED,
    }
    server = Serve(directory, port=probes, log=directory / "log", **environment)
    try:
        server.wait_ready()
        assert stat.S_IMODE(data.stat().st_mode) == 0o600
        with over(data) as client:
            assert client.post("/v1/check", json=CHECK).status_code == 200
        with over(admin) as client:
            assert client.get("/admin/v1/tiers", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        with Client(f"unix:{data}", deadline_s=PATIENCE_S, on_failure="raise") as client:
            assert client.check("/api/v1/a", api_key=FREE, cost=0).allowed
        assert server.run("check", FREE, "GET", "/api/v1/a", "--cost", "0").returncode == 0
    finally:
        code, _, _ = server.stop()
    assert code == 0, (directory / "log").read_text()
    assert not data.exists()
    assert not admin.exists()
