"""Traefik as a process that reads deploy/traefik/tidegate.yml. It looks for no updates and sends no statistics."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

import httpx
import pytest

from tests.servers.deployed import configured
from tests.servers.ports import HOST, free_port
from tests.servers.prometheus import Service


class Traefik(Service):
    """One Traefik; a context manager that starts and stops it.

    Args:
        tidegate: port of the instance.
        api: port of the API.
        changes: further texts of the file, and what to put in their place.
    """

    def __init__(self, tidegate: int, api: int, changes: Mapping[str, str] | None = None) -> None:
        if shutil.which("traefik") is None:
            pytest.skip("traefik is not on PATH: scripts/build-traefik builds it, within minutes")
        super().__init__("traefik", "/ping")
        self.clients = free_port()
        """The port at which clients send requests for the API."""
        ports = {"10.0.0.10:8080": f"{HOST}:{tidegate}", "127.0.0.1:8000": f"{HOST}:{api}"}
        (self.directory / "tidegate.yml").write_text(configured("traefik/tidegate.yml", {**ports, **(changes or {})}))

    def arguments(self) -> Sequence[str]:
        return (
            "--global.checknewversion=false",
            "--global.sendanonymoususage=false",
            f"--entrypoints.clients.address={HOST}:{self.clients}",
            f"--entrypoints.operators.address={self.address}",
            "--ping.entrypoint=operators",
            f"--providers.file.filename={self.directory / 'tidegate.yml'}",
            "--log.level=DEBUG",
        )

    def _answers(self) -> bool:
        """Whether it also has read the file: before, no path is found."""
        return super()._answers() and httpx.get(f"http://{HOST}:{self.clients}/", timeout=5).status_code != 404
