"""Certificates for TLS tests, of an authority that nobody else trusts."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """A certificate authority with one certificate for a server on loopback and one for a client, as PEM files.

    Args:
        directory: where the files go; made if it is not there.

    Attributes:
        ca: certificate of the authority, what the other side is to trust.
        server_cert: certificate for 127.0.0.1 and localhost, with its chain.
        server_key: its key.
        client_cert: certificate of a client, with its chain.
        client_key: its key.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        authority = trustme.CA(organization_name=f"Tidegate tests {directory.name}")
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.server_cert, self.server_key = self._issue(authority, "server", "127.0.0.1", "localhost")
        self.client_cert, self.client_key = self._issue(authority, "client", "client.tidegate.test")

    def unrelated(self) -> Authority:
        """Make a second authority that knows nothing of this one, in a directory below: for tests of refusals.

        Returns:
            The other authority.
        """
        return Authority(self.directory / "unrelated")

    def _issue(self, authority: trustme.CA, name: str, *identities: str) -> tuple[Path, Path]:
        leaf = authority.issue_cert(*identities)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert.unlink(missing_ok=True)
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(str(cert), append=True)
        leaf.private_key_pem.write_to_path(str(key))
        return cert, key
