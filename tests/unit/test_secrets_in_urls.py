"""What messages repeat of URLs: never a piece of a password, however badly it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.moments import PATIENCE_S
from tests.servers import forked
from tidegate.catalog.sql.engine import open_engine, redacted_url
from tidegate.counters.factory import open_counters
from tidegate.errors import SettingsError
from tidegate.server_url import Server

SECRET = "hunter2"
CATALOGS = {
    "postgresql://u:hunter2/hunter2@h/db": "%2F",
    "postgresql://u:hunter2@hunter2@h/db": "%40",
    "postgresql://u:pw@h:hunter2/db": "ports",
    "postgresql://u:hunter2": "ports",
    "postgresql://[::1": "postgresql://",
    "postgresql://u:hunter2%zz@h/db": "percent-encoded",
    "postgresql://h/db?hunter2=1": "query parameter",
    "postgresql+psycopg://u:hunter2@h/x": "postgresql+psycopg",
    "mysql://u:hunter2@h/x": "mysql",
    "sqlite://u:hunter2@h/x": "three slashes",
    "u:hunter2@h/db": "database URL",
    "hunter2": "database URL",
}
SERVERS = {
    "http://u:hunter2@h": "must not contain a user or a password",
    "http://u:hunter2/x@h": "must not contain a user or a password",
    "http://h:hunter2": "'http://h:…'",
    "https://user:hunter2": "'https://user:…'",
    "http://h/?key=hunter2": "'http://h/'",
    "http://h/#hunter2": "'http://h/'",
    "http://[::1": "not a valid URL",
    "user:hunter2": "'user:…'",
}


@pytest.mark.parametrize("url", CATALOGS)
def test_a_catalog(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        open_engine(url)
    assert CATALOGS[url] in refused.value.message
    assert SECRET not in refused.value.message
    assert SECRET not in redacted_url(url) or url == SECRET


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("postgresql://u:hunter2@h1:1,[::1]:2/name?sslmode=require", "postgresql://h1:1,[::1]:2/name"),
        ("postgres://u:hunter2?hunter2#@h/name", "postgres://h/name"),
        ("postgresql:///name?host=/run/postgresql&password=hunter2@h", "postgresql:///name"),
        ("sqlite:////home/a@b/tidegate.db", "sqlite:////home/a@b/tidegate.db"),
    ],
)
def test_what_is_shown_of_a_catalog(url: str, seen: str) -> None:
    assert redacted_url(url) == seen


@pytest.mark.parametrize("url", SERVERS)
def test_a_server(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Server.at(url)
    assert SERVERS[url] in refused.value.message
    assert SECRET not in refused.value.message


@given(st.text("/?#@:[]%,= \t", max_size=4), st.text("/?#@:[]%,= \t", max_size=4))
def test_no_password_is_odd_enough(before: str, after: str) -> None:
    """Whatever stands around the secret part of a password: a refusal does not repeat it, and is no other exception."""
    password = f"{before}hunter2{after}"
    said = [_refusal(open_counters, f"{scheme}://u:{password}@h/m") for scheme in ("redis", "redis+cluster", "redis+sentinel")]
    url = f"postgresql://u:{password}@h/db"
    said += [redacted_url(url), _refusal(open_engine, url)]
    # Behind a raw '@' the rest of a password cannot be told from a host.
    assert SECRET not in "".join(said) or "@" in before


def _refusal(make: Callable[[str], object], url: str) -> str:
    try:
        make(url)
    except SettingsError as error:
        return error.message
    return ""


@pytest.mark.parametrize("url", ["redis://[::1", "redis://:hunter2/x@h", "u:hunter2@h"])
def test_the_command_reports_it_in_a_line(url: str, tmp_path: Path) -> None:
    environment = {"TIDEGATE_COUNTERS__URL": url, "TIDEGATE_CATALOG__URL": "sqlite://", "PATH": ""}
    ran = forked.run(("serve",), PATIENCE_S, tmp_path, environment)
    assert ran.returncode == 2
    assert "counters.url" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert SECRET not in ran.stdout + ran.stderr
