"""JSON Web Tokens: which are accepted, which check refuses the others, and what a flood of bad ones costs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import jwt
from tests.moments import PATIENCE_S
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.errors import InvalidToken, PolicyError, TokenKeysUnavailable, TooManyTokens
from tidegate.jwt.key_set import MAX_BYTES, KeySet, KeySetUnreadable, parse_key_set
from tidegate.jwt.verification_queue import VerificationQueue
from tidegate.jwt.verifier import JwtVerifier
from tidegate.policy.jwt_policy import JwtPolicy

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SHORT_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, **fields: object) -> dict[str, object]:
    kind = {"RSA": jwt.algorithms.RSAAlgorithm, "EC": jwt.algorithms.ECAlgorithm, "OKP": jwt.algorithms.OKPAlgorithm}
    name = "RSA" if isinstance(key, rsa.RSAPrivateKey) else "EC" if isinstance(key, ec.EllipticCurvePrivateKey) else "OKP"
    return {**json.loads(kind[name].to_jwk(key.public_key())), **fields}


def key_set(*keys: dict[str, object]) -> bytes:
    return json.dumps({"keys": keys}).encode()


KEYS = key_set(jwk(RSA, kid="rsa"), jwk(EC, kid="ec"), jwk(ED, kid="ed"))


def token(
    key: Any = RSA, algorithm: str = "RS256", kid: str | None = "rsa", header: dict[str, object] | None = None, **claims: object
) -> bytes:
    body = {"exp": int(time.time()) + 3600, "iss": "https://issuer", "aud": "api", "org_id": "acme", **claims}
    body = {name: value for name, value in body.items() if value is not None}
    headers = {**({"kid": kid} if kid is not None else {}), **(header or {})}
    return jwt.encode(body, key, algorithm=algorithm, headers=headers).encode()


def forged(header: dict[str, object], signature: bytes = b"", **claims: object) -> bytes:
    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    payload = {"exp": int(time.time()) + 3600, "iss": "https://issuer", "aud": "api", **claims}
    return b".".join((part(header), part(payload), base64.urlsafe_b64encode(signature).rstrip(b"=")))


async def verifier(tmp_path: Path, keys: bytes = KEYS, clock: Any = time.time, **options: Any) -> JwtVerifier:
    file = tmp_path / "jwks.json"
    file.write_bytes(keys)
    policy = JwtPolicy.make(jwks=str(file), issuer="https://issuer", audience="api", **options)
    loaded = KeySet(policy)
    await loaded.load()
    return JwtVerifier(policy, {name: name for name in ("org_id", "seats", "staff", "roles")}, loaded, clock, UnknownKeyLimit(20))


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(RSA, "RS256", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")])
async def test_a_valid_token_is_accepted_and_remembered(tmp_path: Path, key: Any, algorithm: str, kid: str) -> None:
    verify = await verifier(tmp_path)
    raw = token(key, algorithm, kid, seats=7, staff=True, roles=["a"])
    assert verify.remembered(raw) is None
    valid = await verify.verify(raw)
    assert valid.attributes == {"org_id": "acme", "seats": "7", "staff": "true"}  # lists are left out
    assert verify.remembered(raw) is valid
    assert await verify.verify(raw) is valid
    assert verify.verified == 1


def _hmac_with_public_key() -> bytes:
    """The classic confusion: the public key, which everybody has, as an HMAC secret."""
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    unsigned = forged({"alg": "HS256", "kid": "rsa"}).rpartition(b".")[0]
    return unsigned + b"." + base64.urlsafe_b64encode(hmac.digest(public, unsigned, "sha256")).rstrip(b"=")


REFUSED = {
    "expired": ("exp", lambda: token(exp=int(time.time()) - 31)),
    "without expiry": ("exp", lambda: token(exp=None)),
    "expiry is no number": ("exp", lambda: forged({"alg": "RS256", "kid": "rsa"}, exp="soon")),
    "expiry is infinite": ("exp", lambda: forged({"alg": "RS256", "kid": "rsa"}, exp=float("inf"))),
    "not yet valid": ("nbf", lambda: token(nbf=int(time.time()) + 3600)),
    "issued in the future": ("nbf", lambda: token(iat=int(time.time()) + 3600)),
    "wrong issuer": ("iss", lambda: token(iss="https://other")),
    "without issuer": ("iss", lambda: token(iss=None)),
    "wrong audience": ("aud", lambda: token(aud="other")),
    "without audience": ("aud", lambda: token(aud=None)),
    "wrong signature": ("signature", lambda: token(OTHER_RSA)),
    "alg none": ("alg", lambda: forged({"alg": "none", "kid": "rsa"})),
    "alg None": ("alg", lambda: forged({"alg": "None", "kid": "rsa"})),
    "alg is a list": ("alg", lambda: forged({"alg": ["RS256"], "kid": "rsa"})),
    "hmac with the public key": ("alg", _hmac_with_public_key),
    "algorithm not allowed": ("alg", lambda: token(RSA, "PS512")),
    "key of another type": ("kid", lambda: token(RSA, "RS256", "ec")),
    "unknown kid": ("kid", lambda: token(kid="other")),
    "kid is a number": ("kid", lambda: forged({"alg": "RS256", "kid": 7})),
    "crit": ("crit", lambda: token(header={"crit": ["exp"]})),
    "key in the header": ("signature", lambda: token(OTHER_RSA, header={"jwk": jwk(OTHER_RSA)})),
    "two parts": ("form", lambda: b"a.b"),
    "empty": ("form", lambda: b""),
    "no JSON": ("form", lambda: b"!!.!!.!!"),
    "deep JSON": ("form", lambda: base64.urlsafe_b64encode(b"[" * 4000) + b".e30.AA"),
    "not ASCII": ("form", "é.é.é".encode),
    "payload is a list": ("form", lambda: token().split(b".")[0] + b".W10.AA"),
    "long claim": ("claim", lambda: token(org_id="x" * 257)),
    "100 KB": ("size", lambda: token(pad="x" * 100_000)),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_the_refusal_names_the_check_and_never_the_token(tmp_path: Path, name: str) -> None:
    check, make = REFUSED[name]
    raw = make()
    verify = await verifier(tmp_path)
    with pytest.raises(InvalidToken) as refused:
        await verify.verify(raw)
    assert refused.value.details == {"check": check}
    assert not raw or raw.decode("latin-1") not in refused.value.message
    assert verify.remembered(raw) is None


async def test_without_kid_only_an_unambiguous_key_is_used(tmp_path: Path) -> None:
    verify = await verifier(tmp_path)
    assert (await verify.verify(token(kid=None))).attributes == {"org_id": "acme"}
    verify = await verifier(tmp_path, key_set(jwk(RSA, kid="a"), jwk(OTHER_RSA, kid="b")))
    with pytest.raises(InvalidToken):
        await verify.verify(token(kid=None))


async def test_a_remembered_token_ends_with_its_expiry(tmp_path: Path) -> None:
    now = time.time()
    verify = await verifier(tmp_path, clock=lambda: now)
    raw = token(exp=int(now) + 60)
    await verify.verify(raw)
    now += 60 + 31
    assert verify.remembered(raw) is None
    with pytest.raises(InvalidToken, match="expired"):
        await verify.verify(raw)


async def test_a_withdrawn_key_ends_what_it_had_verified(tmp_path: Path) -> None:
    verify = await verifier(tmp_path)
    raw = token()
    await verify.verify(raw)
    (tmp_path / "jwks.json").write_bytes(key_set(jwk(OTHER_RSA, kid="rsa")))
    await verify._keys.load()
    assert verify.remembered(raw) is None
    with pytest.raises(InvalidToken, match="signature"):
        await verify.verify(raw)
    # What was refused with the old key is verified with the new one.
    assert (await verify.verify(token(OTHER_RSA))).attributes == {"org_id": "acme"}


async def test_the_tables_are_bounded(tmp_path: Path) -> None:
    verify = await verifier(tmp_path)
    verify._max_remembered = 3
    for seats in range(5):
        await verify.verify(token(EC, "ES256", "ec", seats=seats))
    assert len(verify._valid) == 3


async def test_a_client_whose_signatures_fail_is_refused_before_they_are_verified(tmp_path: Path) -> None:
    verify = await verifier(tmp_path)
    for number in range(20):
        with pytest.raises(InvalidToken):
            await verify.verify(token(OTHER_RSA, seats=number), "203.0.113.9")
    cost = verify.verified
    with pytest.raises(TooManyTokens) as refused:
        await verify.verify(token(OTHER_RSA, seats=99), "203.0.113.9")
    assert refused.value.details["retry_after"] > 0
    assert verify.verified == cost
    assert (await verify.verify(token(), "203.0.113.10")).attributes == {"org_id": "acme"}


async def test_a_failed_token_is_not_verified_twice(tmp_path: Path) -> None:
    verify = await verifier(tmp_path)
    raw = token(OTHER_RSA)
    for _ in range(3):
        with pytest.raises(InvalidToken, match="signature"):
            await verify.verify(raw)
    assert verify.verified == 1


async def test_a_flood_of_one_client_delays_another_by_one_job() -> None:
    queue = VerificationQueue(max_per_client=100)
    done: list[str] = []
    flood = [asyncio.ensure_future(queue.run("flood", lambda: done.append("flood"))) for _ in range(100)]
    await asyncio.sleep(0)  # all are in the queue, and its worker has not begun
    other = asyncio.ensure_future(queue.run("other", lambda: done.append("other")))
    await asyncio.gather(other, *flood)
    assert done.index("other") <= 101
    assert len(done) == 101


async def test_the_queue_serves_clients_in_turn_and_is_bounded() -> None:
    queue = VerificationQueue(max_waiting=6, max_per_client=3)
    done: list[str] = []
    jobs = [asyncio.ensure_future(queue.run(client, lambda client=client: done.append(client))) for client in "aaabbb"]
    late = [asyncio.ensure_future(queue.run(client, lambda: None)) for client in "ac"]
    results = await asyncio.gather(*late, return_exceptions=True)
    assert all(isinstance(result, TooManyTokens) for result in results)
    await asyncio.gather(*jobs)
    assert done == list("ababab")
    assert len(queue) == 0


async def test_no_keys_yet_is_not_the_clients_fault(tmp_path: Path) -> None:
    policy = JwtPolicy.make(jwks=str(tmp_path / "absent.json"))
    keys = KeySet(policy)
    await keys.load()
    assert "cannot be read" in keys.failure
    with pytest.raises(TokenKeysUnavailable):
        await JwtVerifier(policy, {}, keys).verify(token())


class Issuer:
    """A server of a key set that can change, be slow, fail."""

    def __init__(self) -> None:
        self.body = KEYS
        self.status = 200
        self.headers: dict[str, str] = {}
        self.fetches = 0
        self.drips = threading.Event()
        self.go_on = threading.Event()
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                self.send_response(issuer.status)
                for name, value in issuer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(issuer.body)))
                self.end_headers()
                if issuer.drips.is_set():
                    # A part now and then, so that no single wait is long.
                    for byte in issuer.body:
                        if issuer.go_on.wait(0.05):
                            return
                        with contextlib.suppress(OSError):
                            self.wfile.write(bytes([byte]))
                    return
                self.wfile.write(issuer.body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks.json"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    running = Issuer()
    yield running
    running.go_on.set()
    running.server.shutdown()
    running.server.server_close()


async def test_a_rotated_key_is_found_by_its_kid_and_unknown_ones_do_not_flood_the_issuer(issuer: Issuer) -> None:
    policy = JwtPolicy.make(jwks=issuer.url, issuer="https://issuer", audience="api")
    now = 1000.0
    keys = KeySet(policy, clock=lambda: now)
    await keys.load()
    verify = JwtVerifier(policy, {"org_id": "org_id"}, keys)
    issuer.body = key_set(jwk(RSA, kid="rsa"), jwk(OTHER_RSA, kid="new"))
    # All that come while the set is fetched wait for it.
    valid = await asyncio.gather(*(verify.verify(token(OTHER_RSA, kid="new", seats=seat)) for seat in range(5)))
    assert [one.attributes for one in valid] == [{"org_id": "acme"}] * 5
    assert issuer.fetches == 2
    for number in range(10):
        with pytest.raises(InvalidToken):
            await verify.verify(token(OTHER_RSA, kid=f"unknown-{number}"))
    assert issuer.fetches == 2
    now += 60
    with pytest.raises(InvalidToken):
        await verify.verify(token(OTHER_RSA, kid="unknown-a-minute-later"))
    assert issuer.fetches == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": 500}, "the server answered 500"),
        ({"body": b"<html>"}, "not JSON"),
        ({"body": b"[" * 100_000}, "not JSON"),
        ({"body": b"{}"}, "no list 'keys'"),
        ({"body": b" " * (MAX_BYTES + 1)}, "larger than"),
        ({"body": key_set(*[jwk(RSA)] * 101)}, "at most 100"),
        ({"body": key_set(jwk(SHORT_RSA, kid="short"))}, "no public key"),
        ({"body": key_set({"kty": "oct", "k": "c2VjcmV0", "kid": "hmac"})}, "no public key"),
        ({"body": key_set(jwk(RSA, use="enc"))}, "no public key"),
        ({"body": b'{"keys": [7, {"kty": "RSA", "n": 3, "e": []}]}'}, "no public key"),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}}, "the server answered 302"),
    ],
)
async def test_the_last_keys_stay_in_use_while_the_issuer_fails(issuer: Issuer, change: dict[str, Any], reason: str) -> None:
    policy = JwtPolicy.make(jwks=issuer.url, issuer="https://issuer", audience="api")
    keys = KeySet(policy)
    await keys.load()
    for name, value in change.items():
        setattr(issuer, name, value)
    await keys.load()
    assert reason in keys.failure
    assert (await JwtVerifier(policy, {}, keys).verify(token())).attributes == {}
    issuer.status, issuer.body, issuer.headers = 200, KEYS, {}
    await keys.load()
    assert keys.failure == ""


async def test_a_slow_issuer_is_given_up_and_the_last_keys_stay_in_use(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = JwtPolicy.make(jwks=issuer.url, issuer="https://issuer", audience="api")
    keys = KeySet(policy)
    await keys.load()
    issuer.drips.set()
    monkeypatch.setattr("tidegate.jwt.key_set.FETCH_S", 0.3)
    await keys.load()
    assert "was not complete within 0.3 s" in keys.failure
    valid = await JwtVerifier(policy, {"org_id": "org_id"}, keys).verify(token(RSA, kid="rsa"))
    assert valid.attributes == {"org_id": "acme"}


async def test_follow_loads_a_changed_file(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(KEYS)
    keys = KeySet(JwtPolicy.make(jwks=str(file)))
    following = asyncio.create_task(keys.follow())
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not keys.loaded:
                await asyncio.sleep(0.01)
            file.write_bytes(key_set(jwk(OTHER_RSA, kid="new")))
            while "new" not in keys.keys:
                await asyncio.sleep(0.01)
    finally:
        following.cancel()
    assert list(keys.keys) == ["new"]


async def test_an_unusable_file_is_reported_until_it_is_corrected(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(b"{}")
    os.utime(file, (1, 1))
    keys = KeySet(JwtPolicy.make(jwks=str(file)))
    for _ in range(3):
        await keys.load()
        assert "no list 'keys'" in keys.failure
    file.write_bytes(KEYS)
    await keys.load()
    assert (keys.failure, keys.loaded) == ("", True)


async def test_keys_that_change_while_a_token_waits_decide(tmp_path: Path) -> None:
    verify = await verifier(tmp_path)
    raw = token()
    waiting = asyncio.ensure_future(verify.verify(raw))
    await asyncio.sleep(0)
    verify._keys.keys = parse_key_set(key_set(jwk(OTHER_RSA, kid="rsa")))
    verify._keys.generation += 1
    with pytest.raises(InvalidToken, match="signature"):
        await waiting
    assert verify.remembered(raw) is None


def test_private_parts_of_a_key_are_not_used() -> None:
    private = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA))
    assert "d" in private
    [key] = parse_key_set(key_set({**private, "kid": "a"}))["a"]
    assert not hasattr(key.key, "private_numbers")
    with pytest.raises(KeySetUnreadable):
        parse_key_set(b"null")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"jwks": ""}, "jwks"),
        ({"jwks": 7}, "jwks"),
        ({"jwks": "http://issuer.example/jwks"}, "https://"),
        ({"jwks": "ftp://issuer.example/jwks"}, "https://"),
        ({"jwks": "https://user:secret@issuer.example/"}, "user name"),
        ({"jwks": "https://[::1"}, "valid URL"),
        ({"jwks": "https://issuer.example:99999/"}, "valid URL"),
        ({"algorithms": ["none"]}, "'none' and HMAC"),
        ({"algorithms": ["HS256"]}, "'none' and HMAC"),
        ({"algorithms": []}, "empty"),
        ({"algorithms": "RS256"}, "list of texts"),
        ({"audience": [7]}, "list of texts"),
        ({"audience": ["a"] * 17}, "at most 16"),
        ({"header": "no header"}, "HTTP header"),
        ({"leeway_s": 301}, "0 to 300"),
        ({"leeway_s": True}, "0 to 300"),
    ],
)
def test_a_wrong_field_is_refused_with_the_remedy(fields: dict[str, object], words: str) -> None:
    with pytest.raises(PolicyError) as refused:
        JwtPolicy.make(**{"jwks": "https://issuer.example/jwks", **fields})
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)
