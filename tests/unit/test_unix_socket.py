"""Unix sockets to listen on: what may be replaced, permissions, removal."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.errors import SettingsError
from tidegate.server.addresses import admin_address, free_address, probes_address
from tidegate.server.listener import UnixSocket
from tidegate.settings_loader import load_settings


@pytest.fixture
def directory() -> Iterator[Path]:
    """One whose path is short enough."""
    made = tempfile.mkdtemp(prefix="tg-", dir="/tmp")
    yield Path(made)
    shutil.rmtree(made)


def test_the_socket_has_its_permissions_and_is_removed(directory: Path) -> None:
    path = directory / "t.sock"
    mask = os.umask(0o022)
    try:
        bound = UnixSocket(f"unix:{path}", 0o660)
        assert os.umask(0o022) == 0o022, "the mask of the process is as before"
    finally:
        os.umask(mask)
    with bound.listening:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        bound.listening.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        with pytest.raises(SettingsError, match=r"server\.http = .*: cannot listen on .*: a process listens there; stop it"):
            free_address(f"unix:{path}", "server.http")
    bound.remove()
    assert not path.exists()


def test_the_file_of_a_killed_process_is_replaced_and_one_of_another_process_is_not_removed(directory: Path) -> None:
    path = directory / "t.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    first = UnixSocket(f"unix:{path}", 0o600)
    first.listening.close()
    second = UnixSocket(f"unix:{path}", 0o600)
    first.remove()
    assert path.exists()
    second.listening.close()
    second.remove()
    assert not path.exists()


def test_other_files_are_not_replaced(directory: Path) -> None:
    file = directory / "file"
    file.write_text("important")
    (directory / "link").symlink_to(file)
    for name in ("file", "link"):
        with pytest.raises(SettingsError, match="is not a socket; remove it or set another path"):
            UnixSocket(f"unix:{directory / name}", 0o600)
    assert file.read_text() == "important"
    with pytest.raises(SettingsError, match=f"the directory {directory}/absent does not exist; create it"):
        UnixSocket(f"unix:{directory}/absent/t.sock", 0o600)


def test_two_listeners_cannot_have_one_address(directory: Path) -> None:
    address = f"unix:{directory}/t.sock"
    settings = load_settings(None, {"TIDEGATE_SERVER__ADMIN": address, "TIDEGATE_SERVER__PROBES": "127.0.0.1:8081"})
    with pytest.raises(SettingsError, match=r"has the path of server\.http: set another path for the control plane"):
        admin_address(settings, (address, 0))
    others = {"server.http": (address, 0), "server.admin": None, "server.grpc": ("127.0.0.1", 8081)}
    with pytest.raises(SettingsError, match=r"server\.probes = .* has the port of server\.grpc"):
        probes_address(settings, others)
