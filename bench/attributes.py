"""What a check with attributes costs beside one with an API key: CPU of the server per `POST /v1/check`, and memory per subject.

    python -m bench.attributes [--smoke]

Two attributes and a subject of both, in the body or as claims of a remembered JSON Web Token, in rounds that alternate with
checks by API key; medians over the rounds. One limit: limits of the tier itself would count the address beside, a second subject,
where they count the same API key. Memory is that of `bench.memory`, with subjects of equal length.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

import jwt
from bench.http import cpu_of_threads_s, need_wrk, ours, wrk
from bench.measure import Goal, asked_for_smoke, report

POLICY = """
[attributes]
org = "jwt:org"
user = "jwt:sub"
[jwt]
jwks = "{jwks}"
issuer = "https://issuer.example"
audience = "api"
[callers]
default_tier = "users"
[[tiers]]
name = "users"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  subject = ["org", "user"]
  limits = ["100000000/minute"]
[[tiers]]
name = "keys"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["100000000/minute"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "keys"
"""
POST = """
wrk.method = "POST"
wrk.body = '{%s,"method":"GET","path":"/api/v1/items","ip":"203.0.113.7"}'
wrk.headers["Content-Type"] = "application/json"
"""
KEY, ATTRIBUTES, TOKEN = "an API key", "two attributes and a subject of both", "a remembered JWT with the two as claims"


def callers(directory: str) -> dict[str, str]:
    """Who sends the checks: fields of a body by name. Writes the issuer's public key beside."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "a"}
    Path(directory, "jwks.json").write_text(json.dumps({"keys": [public]}))
    claims = {"iss": "https://issuer.example", "aud": "api", "exp": int(time.time()) + 86_400, "org": "acme", "sub": "user-42"}
    token = jwt.encode({**claims, "scope": "read write " * 8}, key, algorithm="RS256", headers={"kid": "a"})
    return {
        KEY: '"api_key":"demo-free-key-0001"',
        ATTRIBUTES: '"attributes":{"org":"acme","user":"user-42"}',
        TOKEN: f'"bearer":"{token}"',
    }


def bytes_each(beginning: str, count: int) -> float:
    """Resident bytes per subject in memory."""
    command = [sys.executable, "-m", "bench.memory", "--count", str(count), "--beginning", beginning]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds = (1, 1) if smoke else (9, 2)
    need_wrk()
    with tempfile.TemporaryDirectory() as directory:
        sent = callers(directory)
        cpu_us: dict[str, list[float]] = {name: [] for name in sent}
        with ours(directory, POLICY.replace("{jwks}", f"{directory}/jwks.json")) as (pid, port):
            for number, fields in enumerate(sent.values()):
                script = Path(directory, f"{number}.lua")
                script.write_text(POST % fields)
                wrk(port, "/v1/check", 1, 64, str(script), ())
            for _ in range(rounds):
                for number, name in enumerate(sent):
                    before = cpu_of_threads_s(pid)
                    done = wrk(port, "/v1/check", seconds, 64, str(Path(directory, f"{number}.lua")), ())
                    if done["errors"]:
                        raise RuntimeError(f"{done['errors']} checks with {name} failed")
                    cpu_us[name].append((cpu_of_threads_s(pid) - before) / done["requests"] * 1e6)
    count = 20_000 if smoke else 300_000
    memory = {
        name: bytes_each(beginning, count) for name, beginning in (("API key", "k:0123456789"), ("attribute", "a:user=01234"))
    }

    def ratio(name: str) -> float:
        return statistics.median(own / key for own, key in zip(cpu_us[name], cpu_us[KEY], strict=True))

    report(
        "attributes",
        "POST /v1/check by attributes (CPU of the server's process), and subjects in memory",
        [
            *((f"{name}, µs CPU", statistics.median(taken), None) for name, taken in cpu_us.items()),
            ("CPU with two attributes to that with an API key", ratio(ATTRIBUTES), Goal(at_most=1.15)),
            ("CPU with a remembered JWT to that with an API key", ratio(TOKEN), Goal(at_most=1.2)),
            *((f"memory of a subject by {name}, bytes", each, None) for name, each in memory.items()),
            ("memory of a subject by attribute to one by API key", memory["attribute"] / memory["API key"], Goal(at_most=1.05)),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
