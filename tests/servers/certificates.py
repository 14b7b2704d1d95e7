"""Certificates for TLS tests, of an authority that nobody else trusts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme


class Authority:
    """A certificate authority with one certificate for a server on loopback and one for a client, as PEM files.

    Args:
        directory: where the files go; made if it is not there.

    Attributes:
        ca: certificate of the authority, what the other side is to trust.
        server_cert: certificate for 127.0.0.1 and localhost, with its chain.
        client_cert: certificate of a client, with its chain.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._authority = trustme.CA(organization_name=f"Tidegate tests {directory.name}")
        self.ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        self.server_cert, self.server_key = self.issue("server", "127.0.0.1", "localhost")
        self.client_cert, self.client_key = self.issue("client", "client.tidegate.test")

    def unrelated(self) -> Authority:
        """Make a second authority that knows nothing of this one, in a directory below: for tests of refusals.

        Returns:
            The other authority.
        """
        return Authority(self.directory / "unrelated")

    def issue(
        self, name: str, *identities: str, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> tuple[Path, Path]:
        """Issue another certificate.

        Args:
            name: of its files; those that are there are replaced.
            identities: DNS names and addresses.
            not_before: when it becomes valid; long ago if None.
            not_after: when it expires; in the far future if None.

        Returns:
            The file with the certificate and its chain, and the file with its key.
        """
        leaf = self._authority.issue_cert(*identities, not_before=not_before, not_after=not_after)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return cert, key
