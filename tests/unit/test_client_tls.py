"""Certificates of commands: what is said of files that cannot be used, and what the server of these settings is trusted by."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers.certificates import Authority
from tidegate.cli.client_tls import ClientTls, own_data_plane
from tidegate.cli.data_plane import send_request
from tidegate.errors import SettingsError
from tidegate.server_url import Server
from tidegate.settings_loader import load_settings


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key, ca = authority.client_cert, authority.client_key, authority.ca
    ClientTls(ca, cert, key).context()
    for files, said in (
        (ClientTls(key=key), "--key needs --cert"),
        (ClientTls(ca=tmp_path / "absent"), "--ca .*absent cannot be used: No such file"),
        (ClientTls(ca=key), "--ca .*client.key cannot be used: .*; give a PEM file"),
        (ClientTls(cert=cert), "--cert .*client.pem and its key in the same file cannot be used"),
        (ClientTls(cert=cert, key=authority.server_key), "cannot be used: key values mismatch"),
    ):
        with pytest.raises(SettingsError, match=said):
            files.context()
    with pytest.raises(SettingsError, match="--ca, --cert and --key are for TLS: give an https:// URL instead of http://127"):
        send_request(Server.at("http://127.0.0.1:1"), "GET", "/", timeout_s=1, tls=ClientTls(ca=ca))


def test_the_server_of_these_settings(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert = str(authority.server_cert)
    secured = load_settings(None, {"TIDEGATE_TLS__CERT": cert})
    assert own_data_plane(secured) == ("https://127.0.0.1:8080", ClientTls(pinned=authority.server_cert))
    assert own_data_plane(secured, ClientTls(ca=authority.ca))[1] == ClientTls(ca=authority.ca)
    own_data_plane(secured)[1].context()
    plain = load_settings(None, {"TIDEGATE_TLS__CERT": cert, "TIDEGATE_TLS__DOORS": "admin"})
    assert own_data_plane(plain)[0] == "http://127.0.0.1:8080"
    unix = load_settings(None, {"TIDEGATE_TLS__CERT": cert, "TIDEGATE_SERVER__HTTP": "unix:/run/t.sock"})
    assert own_data_plane(unix)[0] == "unix:/run/t.sock"
    assert Server.at("unix:/run/t.sock").unix_path == "/run/t.sock"
    with pytest.raises(SettingsError, match="not a valid URL"):
        Server.at("unix:run/t.sock")
