"""What a JSON Web Token costs: recalled, verified for the first time, and other clients' wait during a flood of bad tokens.

    python -m bench.jwt [--smoke]

CPU time is the process's own. In the flood, one client sends distinct tokens with wrong signatures as fast as the queue takes
them, and another sends new valid tokens one after the other; the median of its waits is printed in units of one verification.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa

import jwt
from bench.measure import Goal, asked_for_smoke, report
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.errors import InvalidToken, TooManyTokens
from tidegate.jwt.key_set import KeySet
from tidegate.jwt.verifier import JwtVerifier
from tidegate.policy.jwt_policy import JwtPolicy

ISSUER = "https://issuer.example"


def tokens(key: Any, algorithm: str, kid: str, count: int) -> list[bytes]:
    """Distinct tokens of about 700 bytes (RSA)."""
    expires = int(time.time()) + 3600
    return [
        jwt.encode(
            {"iss": ISSUER, "aud": "api", "exp": expires, "sub": f"user-{number}", "org_id": "acme", "scope": "read write " * 8},
            key,
            algorithm=algorithm,
            headers={"kid": kid},
        ).encode()
        for number in range(count)
    ]


def key_file(directory: str, public: list[dict[str, Any]]) -> str:
    """Write a key set; returns its path."""
    path = Path(directory, "jwks.json")
    path.write_text(json.dumps({"keys": public}))
    return str(path)


async def first_us(verifier: JwtVerifier, raw: list[bytes]) -> float:
    """CPU µs of a token that comes for the first time, its parsing included."""
    started = time.process_time_ns()
    for token in raw:
        await verifier.verify(token)
    return (time.process_time_ns() - started) / len(raw) / 1000


def recalled_us(verifier: JwtVerifier, raw: list[bytes], rounds: int) -> float:
    """CPU µs of a token that was verified before. Its bytes are new each time, as a parser's are: bytes cache their hash."""
    sent = [bytes(bytearray(token)) for _ in range(rounds) for token in raw]
    started = time.process_time_ns()
    for token in sent:
        assert verifier.remembered(token) is not None
    return (time.process_time_ns() - started) / len(sent) / 1000


async def waits_us(verifier: JwtVerifier, good: list[bytes], bad: list[bytes]) -> list[float]:
    """How long each good token waited while bad ones of another client fill the queue, µs."""

    async def refused(token: bytes) -> None:
        try:
            await verifier.verify(token, "203.0.113.9")
        except (InvalidToken, TooManyTokens):
            return
        raise AssertionError("a token with a wrong signature was accepted")

    flood = [asyncio.ensure_future(refused(token)) for token in bad]
    waits = []
    for token in good:
        started = time.perf_counter_ns()
        await verifier.verify(token, "198.51.100.7")
        waits.append((time.perf_counter_ns() - started) / 1000)
    await asyncio.gather(*flood)
    return waits


async def measure(smoke: bool) -> None:
    """Print the table."""
    count = 20 if smoke else 500
    key, stranger = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
    curve = ec.generate_private_key(ec.SECP256R1())
    with tempfile.TemporaryDirectory() as directory:
        public = [
            {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "rsa"},
            {**jwt.algorithms.ECAlgorithm.to_jwk(curve.public_key(), as_dict=True), "kid": "ec"},
        ]
        policy = JwtPolicy.make(jwks=key_file(directory, public), issuer=ISSUER, audience="api")
        keys = KeySet(policy)
        await keys.load()

        def verifier() -> JwtVerifier:
            return JwtVerifier(policy, {"org": "org_id", "user": "sub"}, keys, failures=UnknownKeyLimit(10**9))

        rsa_tokens, ec_tokens = tokens(key, "RS256", "rsa", count), tokens(curve, "ES256", "ec", count)
        bad = tokens(stranger, "RS256", "rsa", 10 * count)
        remembering = verifier()
        rsa_us = await first_us(remembering, rsa_tokens)
        ec_us = await first_us(remembering, ec_tokens)
        recalled = statistics.median(recalled_us(remembering, rsa_tokens, 1 if smoke else 20) for _ in range(5))
        waits = await waits_us(verifier(), rsa_tokens, bad)
    report(
        "jwt",
        f"JSON Web Tokens of {len(rsa_tokens[0])} bytes",
        [
            ("recalled, CPU µs", recalled, Goal(at_most=1)),
            ("RS256 for the first time, CPU µs", rsa_us, None),
            ("ES256 for the first time, CPU µs", ec_us, None),
            ("new valid token during a flood, median wait in signatures", statistics.median(waits) / rsa_us, Goal(at_most=20)),
        ],
        smoke=smoke,
    )


def main() -> None:
    """Measure and print."""
    asyncio.run(measure(asked_for_smoke(__doc__)))


if __name__ == "__main__":
    main()
