"""How API keys are hashed: plain SHA-256 at no cost, or HMAC-SHA-256 under a pepper, and never a mixture."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.cli.key_files import read_key_file
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.errors import InvalidApiKey, PolicyError, SettingsError
from tidegate.gate.callers import CallerLookup
from tidegate.gate.gate import Gate
from tidegate.policy.key_format import hash_api_key, parse_key_digest
from tidegate.policy.key_hash import PLAIN, key_hash_as_set, key_hash_of, peppered, use_key_hash
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text
from tidegate.server.system import HIDDEN, settings_without_secrets
from tidegate.settings import KeySettings, Settings
from tidegate.settings_loader import load_settings

PEPPER, KEY = "pepper-of-these-tests-0123456789abcdef", "demo-free-key-0001"
DIGEST = hmac.digest(PEPPER.encode(), KEY.encode(), "sha256").hex()
POLICY = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["5/hour"]
[[api_keys]]
{field} = "{value}"
tier = "free"
"""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = key_hash_as_set()
    use_key_hash(None)
    yield
    use_key_hash(before)


def test_the_pepper_is_the_key_of_an_hmac_and_the_default_is_sha256_itself() -> None:
    used = key_hash_of("hmac-sha256", PEPPER)
    assert [used.start(KEY.encode()).hexdigest() for _ in range(2)] == [DIGEST, DIGEST], "no state is kept"
    assert used.mark != peppered(PEPPER + "x").mark
    assert PEPPER not in used.mark
    assert len(used.mark) <= 40
    assert key_hash_of("sha256", "") is PLAIN
    # Nothing between a check and hashlib.
    assert CallerLookup(CachedCatalog(PolicyCatalog(Policy(()))), lambda: 0)._start_hash is hashlib.sha256


@pytest.mark.parametrize(("field", "value"), [("key", KEY), ("hmac_sha256", DIGEST.upper())])
async def test_a_peppered_catalog_decides(field: str, value: str) -> None:
    use_key_hash(peppered(PEPPER))
    policy = parse_policy(POLICY.format(field=field, value=value))
    assert [key.sha256 for key in policy.api_keys] == [DIGEST]
    written = policy_text(policy)
    assert f'hmac_sha256 = "{DIGEST}"' in written
    assert parse_policy(written).api_keys == policy.api_keys
    gate = Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters())
    for _ in range(2):  # looked up, and cached
        assert (await gate.check(Check.of("/a", api_key=KEY))).tier == "free"
    use_key_hash(None)
    other = Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters())
    with pytest.raises(InvalidApiKey):
        await other.check(Check.of("/a", api_key=KEY))


def test_digests_of_the_other_kind_are_refused_where_keys_are_hashed_otherwise() -> None:
    plain = hash_api_key(KEY)
    # Commands without settings read both.
    assert parse_key_digest(sha256=plain) == plain
    assert parse_key_digest(hmac_sha256=DIGEST) == DIGEST
    use_key_hash(PLAIN)
    with pytest.raises(PolicyError, match="give sha256, or the key itself"):
        parse_key_digest(hmac_sha256=DIGEST)
    use_key_hash(peppered(PEPPER))
    with pytest.raises(PolicyError, match="give hmac_sha256, or the key itself"):
        parse_key_digest(sha256=plain)
    for empty in ("", "\n"):
        with pytest.raises(PolicyError, match="no text at all"):
            parse_key_digest(hmac_sha256=hash_api_key(empty))
    with pytest.raises(PolicyError, match="openssl dgst"):
        parse_key_digest(hmac_sha256="beef")
    with pytest.raises(PolicyError, match="exactly one of"):
        parse_key_digest(sha256=plain, hmac_sha256=DIGEST)
    with pytest.raises(PolicyError) as refused:
        parse_policy(POLICY.format(field="sha256", value=plain))
    assert str(refused.value).startswith("8: ")


def test_files_of_keys_have_one_of_the_forms(tmp_path: Path) -> None:
    file = tmp_path / "keys.csv"
    file.write_text(f"key,hmac_sha256,tier\n{KEY},,free\n,{DIGEST},free\n,beef,free\n{KEY},{DIGEST},free\n,,free\n")
    use_key_hash(peppered(PEPPER))
    hashed, given, *wrong = (row.key for row in read_key_file(file, None))
    assert hashed == given
    assert not isinstance(given, str)
    assert (given.hmac_sha256, given.sha256) == (DIGEST, None)
    assert ["64 hex digits" in str(wrong[0]), *("exactly one of" in str(each) for each in wrong[1:])] == [True] * 3


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TIDEGATE_KEYS__HASH": "hmac-sha256"}, "needs keys.pepper"),
        ({"TIDEGATE_KEYS__HASH": "hmac-sha256", "TIDEGATE_KEYS__PEPPER": "a-short-pepper"}, "32 to 512 visible"),
        ({"TIDEGATE_KEYS__HASH": "hmac-sha256", "TIDEGATE_KEYS__PEPPER": "a-short-pepper" * 3 + "é"}, "32 to 512 visible"),
        ({"TIDEGATE_KEYS__PEPPER": "a-short-pepper" * 3}, 'needs keys.hash = "hmac-sha256"'),
        ({"TIDEGATE_KEYS__HASH": "md5"}, "use one of sha256, hmac-sha256"),
    ],
)
def test_wrong_settings_are_refused_without_the_pepper(environment: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(None, environment)
    assert words in str(refused.value)
    assert "a-short" not in str(refused.value)


def test_the_pepper_is_hidden() -> None:
    shown = settings_without_secrets(Settings(keys=KeySettings(hash="hmac-sha256", pepper=PEPPER)))
    assert shown["keys"]["pepper"] == HIDDEN
    assert shown["keys"]["hash"] == "hmac-sha256"
