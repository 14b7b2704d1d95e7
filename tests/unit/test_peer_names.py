"""Names of client certificates: only the subject alternative names, each kind in its own syntax."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.certificate_names import MAX_NAMES, canonical_name, certificate_names
from tidegate.doors.peer_names import peer_names


def test_dns_names_uris_and_addresses_are_read_in_canonical_form() -> None:
    fields = (
        ("DNS", "Gateway.Example.com"),
        ("URI", "spiffe://example.com/ns/edge/sa/gateway"),
        ("IP Address", "2001:DB8:0:0:0:0:0:1\n"),
        ("IP Address", "192.0.2.7"),
        ("DNS", "gateway.example.com"),
    )
    assert certificate_names(fields) == (
        "gateway.example.com",
        "spiffe://example.com/ns/edge/sa/gateway",
        "2001:db8::1",
        "192.0.2.7",
    )


def test_a_name_in_the_field_of_another_kind_is_ignored() -> None:
    """An authority that may only issue DNS names must not be able to issue a URI or an address."""
    fields: tuple[tuple[str, Any], ...] = (
        ("DNS", "spiffe://example.com/gateway"),
        ("DNS", "192.0.2.7"),
        ("DNS", "good.example\x00.evil.example"),
        ("URI", "gateway.example.com"),
        ("IP Address", "gateway.example.com"),
        ("email", "gateway@example.com"),
        ("DirName", ((("commonName", "gateway.example.com"),),)),
    )
    assert certificate_names(fields) == ()


def test_a_certificate_with_very_many_names_is_read_up_to_a_bound() -> None:
    names = certificate_names(("DNS", f"host-{number}.example.com") for number in range(10 * MAX_NAMES))
    assert len(names) == MAX_NAMES


@pytest.mark.parametrize("text", ["gateway.example.com", "urn:example:gateway", "spiffe://example.com/gw", "::1", "192.0.2.7"])
def test_a_name_that_a_certificate_can_have_is_accepted_in_the_settings(text: str) -> None:
    assert canonical_name(text) == text


@pytest.mark.parametrize("text", ["", "CN=gateway", "two words", "gateway:8080", "gateway.example.com/path", "\N{SNOWMAN}"])
def test_a_name_that_no_certificate_can_have_is_not(text: str) -> None:
    assert canonical_name(text) is None


class _Transport:
    def __init__(self, tls: object) -> None:
        self._tls = tls

    def get_extra_info(self, name: str) -> object:
        return self._tls if name == "ssl_object" else None


class _Unverified:
    def getpeercert(self) -> dict[str, object]:
        return {}


def test_a_peer_without_a_verified_certificate_has_no_names() -> None:
    assert peer_names(_Transport(None)) == ()
    assert peer_names(_Transport(_Unverified())) == ()
