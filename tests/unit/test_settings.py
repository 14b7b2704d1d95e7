"""Settings: file, environment, ranges, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import msgspec
import pytest

from tidegate.errors import SettingsError
from tidegate.listen_address import is_host, join_address, parse_address
from tidegate.server.open_listeners import open_listeners
from tidegate.settings import Settings, unix_mode
from tidegate.settings_loader import load_settings


def test_defaults_run_on_an_empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(None, {})
    assert settings == Settings()
    assert settings.policy_path is None
    (tmp_path / "tidegate.policy.toml").touch()
    assert settings.policy_path == Path("tidegate.policy.toml")
    (tmp_path / "tidegate.toml").write_text('[server]\nhttp = "127.0.0.1:1"\n')
    assert load_settings(None, {}).server.http == "127.0.0.1:1"


def test_the_environment_goes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[server]\nhttp = "127.0.0.1:1"\ndrain_s = 3\n[counters]\nmax_subjects = 5\n')
    environment = {
        "TIDEGATE_SERVER__HTTP": "[::1]:2",
        "TIDEGATE_SERVER__TRUSTED_PROXIES": "10.0.0.0/8, 192.168.0.1",
        "TIDEGATE_CACHE__L1_TTL_S": "1.5",
        "TIDEGATE_PORT": "tcp://10.0.0.1:80",
        "TIDEGATE_SERVICE_HOST": "10.0.0.1",
        "PATH": "/bin",
    }
    settings = load_settings(file, environment)
    assert (settings.server.http, settings.server.drain_s, settings.counters.max_subjects) == ("[::1]:2", 3, 5)
    assert settings.server.trusted_proxies == ("10.0.0.0/8", "192.168.0.1")
    assert settings.cache.l1_ttl_s == 1.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[servr]\n", "did you mean 'server'"),
        ("[server]\nhtp = 1\n", "did you mean 'http'"),
        ("server = 1\n", "write [server]"),
        ("[server]\nhttp = 8080\n", "str"),
        ('[server]\nhttp = "8080"\n', "server.http = '8080'"),
        ('[server]\nhttp = "h:99999"\n', "h:99999"),
        ('[server]\nhttp = "a..b:80"\n', "'a..b:80' is not a valid address"),
        (f'[server]\nadmin = "{"a" * 64}:80"\n', "is not a valid address"),
        (f'[server]\ngrpc = "h:{"9" * 5000}"\n', "is not a valid address"),
        ("[server]\ndrain_s = -1\n", "from 0 to 3600"),
        ("[server]\nworkers = 0\n", "server.workers = 0"),
        ('[server]\ndrain_s = "10s"\n', "float"),
        ('[counters]\non_failure = "open"\n', "local, allow, deny"),
        ('[server]\nlog_level = "loud"\n', "debug"),
        ('[callers_auth]\nmode = "on"\n', "open, token, mtls"),
        ('[callers_auth]\nheader = "X Token"\n', "'X Token' is not the name of a header"),
        ('[callers_auth]\nheader = ""\n', "is not the name of a header"),
        ('[callers_auth]\nheader = "X-API-Key"\n', "has another meaning"),
        ('[callers_auth]\nheader = "X-Forwarded-Token"\n', "has another meaning"),
        ('[callers_auth]\nnames = ["gw.example.com"]\n', 'needs callers_auth.mode = "mtls"'),
        ('[callers_auth]\nmode = "mtls"\n', "callers_auth.names is empty"),
        ('[callers_auth]\nmode = "mtls"\nnames = ["CN=gw"]\n', "'CN=gw', which matches no certificate"),
        ('[callers_auth]\nmode = "mtls"\nnames = ["gw.*.com"]\n', "'gw.*.com', which matches no certificate"),
        ('[callers_auth]\nmode = "mtls"\nnames = ["*"]\n', "needs tls.client_ca"),
        (
            '[callers_auth]\nmode = "mtls"\nnames = ["*"]\n[tls]\ncert = "c"\nclient_ca = "a"\ndoors = ["http"]\n',
            "add 'grpc' to tls.doors",
        ),
        (
            '[server]\nhttp = "unix:/run/t.sock"\n[callers_auth]\nmode = "mtls"\nnames = ["*"]\n'
            '[tls]\ncert = "c"\nclient_ca = "a"\n',
            "needs TLS at server.http = 'unix:/run/t.sock'",
        ),
        ("[server\n", "not valid TOML"),
        ('[server]\nhttp = "unix:run.sock"\n', "needs an absolute path"),
        (f'[server]\nadmin = "unix:/{"a" * 103}"\n', "at most 103 bytes"),
        ('[server]\ngrpc = "unix:/run/grpc.sock"\n', "the gRPC listener cannot use a unix socket"),
        ('[server]\nunix_mode = "rw-rw----"\n', "must be octal, e.g. '0660'"),
        ('[server]\nunix_mode = "1777"\n', "must be octal"),
        ('[tls]\nkey = "k.pem"\n', "tls.key needs tls.cert"),
        ('[tls]\nclient_ca = "ca.pem"\n', "tls.client_ca needs tls.cert"),
        ('[tls]\ncert = "c.pem"\nclient_names = ["gw"]\n', "tls.client_names needs tls.client_ca"),
        ('[tls]\ncert = "c.pem"\nclient_ca = "ca.pem"\nclient_names = ["CN=gw"]\n', "'CN=gw', which matches no certificate"),
        ('[tls]\ncert = "c.pem"\ndoors = ["https"]\n', "tls.doors has 'https'"),
        ('[tls]\ncert = "c.pem"\ndoors = []\n', "tls.doors is empty"),
        ('[cache]\nsecret = "short"\n', "cache.secret has fewer than 16 characters"),
    ],
)
def test_wrong_settings(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings(file, {})
    assert said in refused.value.message
    assert "\n" not in refused.value.message
    assert "short" not in refused.value.message, "no secret is repeated"


def test_addresses_of_unix_sockets() -> None:
    settings = load_settings(None, {"TIDEGATE_SERVER__HTTP": "unix:/run/t.sock", "TIDEGATE_SERVER__UNIX_MODE": "0600"})
    assert parse_address(settings.server.http, "server.http") == ("unix:/run/t.sock", 0)
    assert join_address("unix:/run/t.sock", 0) == "unix:/run/t.sock"
    assert unix_mode(settings.server) == 0o600


def test_names_of_clients_in_the_environment() -> None:
    environment = {
        "TIDEGATE_TLS__CERT": "c.pem",
        "TIDEGATE_TLS__CLIENT_CA": "ca.pem",
        "TIDEGATE_TLS__CLIENT_NAMES": "a.example, b",
    }
    assert load_settings(None, environment).tls.client_names == ("a.example", "b")


def test_callers_with_certificates() -> None:
    environment = {
        "TIDEGATE_TLS__CERT": "c.pem",
        "TIDEGATE_TLS__CLIENT_CA": "ca.pem",
        "TIDEGATE_CALLERS_AUTH__MODE": "mtls",
        "TIDEGATE_CALLERS_AUTH__NAMES": "gw.example.com, *.edge.example.com, spiffe://example.com/gw",
    }
    settings = load_settings(None, environment)
    assert settings.callers_auth.names == ("gw.example.com", "*.edge.example.com", "spiffe://example.com/gw")


def test_listeners_that_accept_any_caller_from_other_machines_are_named_with_the_remedy() -> None:
    def named(**environment: str) -> list[str]:
        warnings = open_listeners(load_settings(None, {f"TIDEGATE_{name}": value for name, value in environment.items()}))
        assert all("callers_auth.mode" in each and "127.0.0.1" in each for each in warnings)
        return [each.split(" ")[0] for each in warnings]

    assert named() == []
    assert named(SERVER__HTTP="localhost:1", SERVER__GRPC="[::1]:2") == []
    assert named(SERVER__HTTP="unix:/run/t.sock", SERVER__GRPC="") == []
    assert named(SERVER__HTTP="0.0.0.0:1", SERVER__GRPC="[::]:2") == ["server.http", "server.grpc"]
    assert named(SERVER__HTTP="limiter.internal:1", SERVER__GRPC="") == ["server.http"]
    assert named(SERVER__HTTP="0.0.0.0:1", SERVER__GRPC="0.0.0.0:2", CALLERS_AUTH__MODE="token") == []
    mutual = {"TLS__CERT": "c", "TLS__CLIENT_CA": "a", "TLS__DOORS": "http"}
    assert named(SERVER__HTTP="0.0.0.0:1", SERVER__GRPC="0.0.0.0:2", **mutual) == ["server.grpc"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "absent", "--config"), (tmp_path, "cannot be read")):
        with pytest.raises(SettingsError, match=said):
            load_settings(path, {})
    with pytest.raises(SettingsError, match=r"unknown setting 'server\.nothing'"):
        load_settings(None, {"TIDEGATE_SERVER__NOTHING": "1"})


def test_addresses() -> None:
    assert parse_address("[::1]:80", "x") == ("::1", 80)
    assert parse_address("localhost:0", "x") == ("localhost", 0)


def test_every_setting_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    for section in msgspec.structs.fields(Settings):
        for field in msgspec.structs.fields(section.type):
            assert f"`{field.name}`" in page, f"{section.name}.{field.name}"
            assert f"TIDEGATE_{section.name}__{field.name}".upper() in page


@pytest.mark.parametrize("host", ["localhost", "10.0.0.1", "::1", "fe80::1%eth0", "a.b.", "bücher.example", "x" * 63])
def test_a_host_that_can_be_looked_up(host: str) -> None:
    assert is_host(host)


@pytest.mark.parametrize("host", ["", "a..b", ".a", "x" * 64, "a b", "a\0b", "a\nb", "\udcff"])
def test_a_host_that_no_resolver_takes(host: str) -> None:
    assert not is_host(host)


def test_every_number_and_choice_is_limited_beside_its_field() -> None:
    """NaN passes a plain comparison with either bound."""
    for variable, value in (("TIDEGATE_SERVER__DRAIN_S", "nan"), ("TIDEGATE_TRACING__SAMPLE", "1.5")):
        with pytest.raises(SettingsError, match="must be from"):
            load_settings(None, {variable: value})
    with pytest.raises(SettingsError, match=r"server\.log_format = 'xml' is not valid; use one of auto, json, text"):
        load_settings(None, {"TIDEGATE_SERVER__LOG_FORMAT": "xml"})
    for section in msgspec.structs.fields(Settings):
        for key, hint in get_type_hints(section.type, include_extras=True).items():
            plain = get_origin(hint) is not Annotated
            assert not (plain and hint in (int, float)), f"{section.name}.{key} has no range"
