"""The policy file: TOML into a `Policy`, whole or not at all; and a catalog that holds one policy in memory.

An error names file, line and reason; an API key is never part of a message.
"""

from __future__ import annotations

import datetime
import difflib
import importlib.util
import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.access import MAX_ENTRIES, access_entry, require_bounded
from tidegate.policy.access_entries import AccessEntry
from tidegate.policy.attributes import AttributeSource, CallerRules, SourceKind, match_of, require_attribute_name
from tidegate.policy.customers import Customer
from tidegate.policy.descriptors import descriptor_text
from tidegate.policy.jwt_policy import JwtPolicy
from tidegate.policy.labels import label_fault
from tidegate.policy.limits import Limit, is_zero, short
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Rule, Subject, Tier, parse_key_digest
from tidegate.policy.namespaces import Namespace, require_name
from tidegate.policy.overrides import Override
from tidegate.policy.quotas import Quota, fit_quotas
from tidegate.policy.toml_customers import read_customers
from tidegate.policy.toml_lines import MAX_KEY_PARTS, LineIndex, line_of_deep_key
from tidegate.policy.toml_lines import Path as KeyPath
from tidegate.policy.toml_overrides import read_overrides, read_subject_overrides
from tidegate.policy.warnings import policy_warnings
from tidegate.timestamps import to_us

__all__ = ["MAX_FILE_BYTES", "load_policy", "parse_policy", "policy_warnings", "read_policy_text"]

MAX_FILE_BYTES: Final = 10_000_000
MAX_TIERS: Final = 1_000
MAX_RULES: Final = 10_000
"""Most rules of one policy, over all its tiers."""
MAX_SOURCES: Final = 64
"""Most attributes in `[attributes]`: each costs a look at every request of a gateway."""
MAX_LIST: Final = 32
"""Most limits or methods of one list that are looked at; a rule takes 16 limits."""

MAX_NAMESPACES: Final = 1_000

_POLICY_FIELDS: Final = ("tiers", "api_keys", "anonymous", "attributes", "callers", "jwt", "namespaces", "access", "customers")
_JWT_FIELDS: Final = ("jwks", "issuer", "audience", "header", "algorithms", "leeway_s")
_NAMESPACE_FIELDS: Final = ("name", "limits", "algorithm", "on_failure", "overrides")
_NAMESPACE_OVERRIDE_FIELDS: Final = ("subject", "limits")
_ACCESS_FIELDS: Final = ("action", "from", "match", "customer", "api_key_id")
_CALLER_FIELDS: Final = ("tier_from", "default_tier")
_TIER_FIELDS: Final = ("name", "limits", "rules", "quotas", "overage", "overrides")
_RULE_FIELDS: Final = (
    "endpoint",
    "descriptor",
    "methods",
    "algorithm",
    "limits",
    "subject",
    "priority",
    "mode",
    "on_failure",
    "name",
    "match",
    "on_missing",
    "quotas",
    "overage",
    "leases",
    "action",
)
_DIGEST_FIELDS: Final = ("key", "hmac_sha256", "sha256")
_KEY_FIELDS: Final = (*_DIGEST_FIELDS, "tier", "customer", "name", "status", "expires_at", "limits", "quotas", "overrides")
# The first word of a record's error message, where it is not the field's name itself.
_FIELD_OF_WORD: Final = {"limit": "limits", "method": "methods", "rule": "name", "tier": "name", "quota": "quotas"}

_T = TypeVar("_T")


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Args:
        path: the file, or a link to it.

    Returns:
        The policy.

    Raises:
        PolicyError: with file, line and reason.
    """
    return parse_policy(read_policy_text(path), str(path))


def read_policy_text(path: Path) -> str:
    """The text of a policy file.

    Args:
        path: the file, or a link to it.

    Returns:
        Its text.

    Raises:
        PolicyError: if it cannot be read, is larger than 10 MB or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise PolicyError("the policy file is not there: give its path with [policy] file, or --policy", str(path)) from None
    except OSError as error:
        raise PolicyError(f"the policy file cannot be read: {error.strerror or error}", str(path)) from None
    if len(raw) > MAX_FILE_BYTES:
        raise PolicyError(f"the policy file has more than {MAX_FILE_BYTES} bytes: keep API keys in the catalog", str(path))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PolicyError("the policy file is not UTF-8 here", str(path), line) from None


def parse_policy(text: str, file: str | None = None) -> Policy:
    """Read the text of a policy file.

    Args:
        text: TOML.
        file: path for messages.

    Returns:
        The policy.

    Raises:
        PolicyError: with file, line and reason.
    """
    # As editors on Windows write it. The lines are found in the same text, or the first table would have none.
    text = text.removeprefix("\ufeff")
    deep = line_of_deep_key(text)
    if deep is not None:
        raise PolicyError(f"a dotted key has more than {MAX_KEY_PARTS} parts: a policy needs two at most", file, deep)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)|\(at end of document\)", str(error))
        line = int(found.group(1)) if found and found.group(1) else text.count("\n") + 1
        reason = str(error)[: found.start()].strip() if found else str(error)
        raise PolicyError(f"not TOML: {reason[:200]}", file, line) from None
    except ValueError:
        # Python's own bound on the digits of a number, which `tomllib` lets through without a position.
        raise PolicyError("not TOML that can be read: a number has too many digits", file, 1) from None
    except RecursionError:
        raise PolicyError("not TOML that can be read: it is nested too deeply", file, 1) from None
    return _Reader(raw, LineIndex(text), file).policy()


class _Reader:
    """Reads one decoded file. `at` is always the path of the thing in hand, for its line."""

    def __init__(self, raw: dict[str, Any], lines: LineIndex, file: str | None) -> None:
        self._raw = raw
        self._lines = lines
        self._file = file
        self._rules_read = 0

    def policy(self) -> Policy:
        self._known(self._raw, _POLICY_FIELDS, ())
        tiers: dict[str, Tier] = {}
        for at, table in self._tables(self._raw, "tiers", (), MAX_TIERS):
            tier = self._tier(table, at)
            if tier.name in tiers:
                raise self._error(f"tier {tier.name!r} stands twice: merge the two, or rename one", (*at, "name"))
            tiers[tier.name] = tier
        if not tiers and not self._raw.get("namespaces"):
            raise self._error("the policy has no tiers: it needs at least one [[tiers]]", ())
        customers = read_customers(_Tables(self), self._raw, tiers)
        keys: dict[str, ApiKey] = {}
        for at, table in self._tables(self._raw, "api_keys", ()):
            api_key = self._api_key(table, at, tiers, customers)
            if api_key.sha256 in keys:
                raise self._error(f"the API key with the digest {api_key.sha256[:12]}… stands twice: remove one", at)
            keys[api_key.sha256] = api_key
        return Policy(
            tuple(tiers.values()),
            tuple(keys.values()),
            self._anonymous(tiers),
            self._attributes(),
            self._callers(tiers),
            self._jwt(),
            self._namespaces(),
            self._access(),
            tuple(customers.values()),
        )

    def _tier(self, table: dict[str, Any], at: KeyPath) -> Tier:
        self._known(table, _TIER_FIELDS, at)
        self._required(table, ("name",), at)
        limits = self._limits(table.get("limits", []), (*at, "limits"))
        rules: dict[str, Rule] = {}
        for rule_at, rule_table in self._tables(table, "rules", at, MAX_RULES):
            self._rules_read += 1
            if self._rules_read > MAX_RULES:
                raise self._error(
                    f"the policy has more than {MAX_RULES} rules: let patterns ('*', '{{id}}') cover several", rule_at
                )
            rule = self._rule(rule_table, rule_at)
            if rule.name in rules:
                raise self._error(
                    f"tier {short(table['name'])} has two rules {rule.name!r}: "
                    "remove one, or give it other methods, mode or a name",
                    rule_at,
                )
            rules[rule.name] = rule
        quotas = self._quotas(table, at)
        tier = self._placed(lambda: Tier.make(table["name"], rules.values(), limits, quotas, table.get("overage")), table, at)
        overrides = read_subject_overrides(_Tables(self), table, at, tier.name, rules)
        return msgspec.structs.replace(tier, managed_by_file=True, overrides=overrides)

    def _rule(self, table: dict[str, Any], at: KeyPath) -> Rule:
        self._known(table, _RULE_FIELDS, at)
        self._required(table, () if "descriptor" in table or "match" in table else ("endpoint",), at)
        quotas = self._quotas(table, at)
        self._required(table, () if quotas or "action" in table else ("limits",), at)
        written = table.get("limits", [])
        # Not parsed: a limit of 0 is an action.
        denies = isinstance(written, list) and len(written) <= MAX_LIST and any(map(is_zero, written))
        limits = tuple(written) if denies else self._limits(written, (*at, "limits"))
        table = self._with_endpoint(table, at)
        methods = table.get("methods", [])
        if not isinstance(methods, list) or ("methods" in table and not methods):
            raise self._error('methods must be a list such as ["GET"]; leave it out for every method', (*at, "methods"))
        if len(methods) > MAX_LIST:
            raise self._error(
                f"methods has {len(methods)} entries: at most {MAX_LIST} are read; leave it out for all", (*at, "methods")
            )
        if "name" in table and (not isinstance(table["name"], str) or not table["name"]):
            raise self._error("name must be a non-empty string", (*at, "name"))
        return self._placed(lambda: Rule.make(**{**table, "limits": limits, "methods": methods, "quotas": quotas}), table, at)

    def _with_endpoint(self, table: dict[str, Any], at: KeyPath) -> dict[str, Any]:
        """A rule's table with an endpoint text for its descriptor, or for a match without an endpoint."""
        if "descriptor" not in table:
            if "endpoint" in table:
                return table
            # Without an endpoint it is for checks without a path, whose entries a descriptor names.
            match, match_at = table["match"], (*at, "match")
            entries = self._placed(lambda: match_of(match), {}, match_at)
            text = self._placed(lambda: descriptor_text(dict(entries)), {}, match_at)
            return {**{field: value for field, value in table.items() if field != "match"}, "endpoint": text}
        descriptor, descriptor_at = table["descriptor"], (*at, "descriptor")
        if "endpoint" in table:
            raise self._error("endpoint and descriptor stand side by side: a rule is for one of them", descriptor_at)
        if not isinstance(descriptor, dict):
            raise self._error('descriptor is a table: write descriptor = { user = "*" }', descriptor_at)
        text = self._placed(lambda: descriptor_text(descriptor), {}, descriptor_at)
        return {**{field: value for field, value in table.items() if field != "descriptor"}, "endpoint": text}

    def _api_key(
        self, table: dict[str, Any], at: KeyPath, tiers: Mapping[str, Tier], customers: Mapping[str, Customer]
    ) -> ApiKey:
        self._known(table, _KEY_FIELDS, at)
        customer = self._customer_of(table, at, customers)
        inherits = "tier" not in table and customer is not None and bool(customer.tier)
        if not inherits:
            self._required(table, ("tier",), at)
        name = table.get("name", "")
        if not isinstance(name, str) or len(name) > 200:
            raise self._error("name must be a string of at most 200 characters", (*at, "name"))
        fault = label_fault(name)
        if fault is not None:
            raise self._error(f"name {fault}", (*at, "name"))
        named = customer.tier if inherits and customer is not None else table["tier"]
        tier = tiers.get(named) if isinstance(named, str) else None
        if tier is None:
            raise self._error(f"tier {short(named)} is not in this policy{_nearest(named, tiers)}", (*at, "tier"))
        status = table.get("status", KeyStatus.ACTIVE.value)
        if status not in tuple(KeyStatus):
            raise self._error(f"status {short(status)} is not known: use active or revoked", (*at, "status"))
        given = [table.get(field) for field in ("key", "sha256", "hmac_sha256")]
        digest_at = (*at, next((field for field in _DIGEST_FIELDS if field in table), "sha256"))
        return ApiKey(
            sha256=self._placed(lambda: parse_key_digest(*given), {}, digest_at),
            tier=tier.name,
            status=KeyStatus(status),
            name=name,
            expires_at_us=self._moment_us(table["expires_at"], (*at, "expires_at")) if "expires_at" in table else None,
            overrides=self._key_overrides(table, at, tier, customer),
            managed_by_file=True,
            customer="" if customer is None else customer.name,
            inherits_tier=inherits,
        )

    def _key_overrides(self, table: dict[str, Any], at: KeyPath, tier: Tier, customer: Customer | None) -> tuple[Override, ...]:
        overrides = read_overrides(_Tables(self), table, at, tier, "key", (Subject.API_KEY,))
        if customer is not None and any(each.quotas for each in overrides):
            raise self._error(
                f"quotas of the customer {customer.name!r} count all of its keys together: override them for the customer, "
                "not for a key",
                (*at, "overrides"),
            )
        return overrides

    def _customer_of(self, table: dict[str, Any], at: KeyPath, customers: Mapping[str, Customer]) -> Customer | None:
        if "customer" not in table:
            return None
        name = table["customer"]
        customer = customers.get(name) if isinstance(name, str) else None
        if customer is None:
            raise self._error(f"customer {short(name)} is not in this policy{_nearest(name, customers)}", (*at, "customer"))
        return customer

    def _anonymous(self, tiers: Mapping[str, Tier]) -> str | None:
        if "anonymous" not in self._raw:
            return None
        table = self._raw["anonymous"]
        at: KeyPath = ("anonymous",)
        if not isinstance(table, dict):
            raise self._error('anonymous is a table: write [anonymous] and tier = "…" below it', at)
        self._known(table, ("tier",), at)
        self._required(table, ("tier",), at)
        name = table["tier"]
        if not isinstance(name, str) or name not in tiers:
            raise self._error(f"tier {short(name)} is not in this policy{_nearest(name, tiers)}", (*at, "tier"))
        return name

    def _attributes(self) -> tuple[AttributeSource, ...]:
        table = self._table("attributes", 'user = "header:X-User-Id"')
        at: KeyPath = ("attributes",)
        if len(table) > MAX_SOURCES:
            raise self._error(f"{len(table)} attributes: at most {MAX_SOURCES} are taken; remove some", at)
        found = []
        for name, text in table.items():
            source = self._placed(lambda name=name, text=text: AttributeSource.make(name, text), {}, (*at, name))  # type: ignore[misc]
            if source.kind is SourceKind.JWT and "jwt" not in self._raw:
                raise self._error(
                    f"attribute {name!r} comes from a bearer token ({short(text)}), but the policy has no [jwt]: add the table "
                    "with 'jwks', the URL or file of the issuer's public keys",
                    (*at, name),
                )
            found.append(source)
        return tuple(found)

    def _callers(self, tiers: Mapping[str, Tier]) -> CallerRules | None:
        if "callers" not in self._raw:
            return None
        table = self._table("callers", 'tier_from = "plan"')
        at: KeyPath = ("callers",)
        self._known(table, _CALLER_FIELDS, at)
        if not table:
            raise self._error("callers names neither tier_from nor default_tier: give one, or leave the table out", at)
        if "tier_from" in table:
            self._placed(lambda: require_attribute_name(table["tier_from"]), {}, (*at, "tier_from"))
        default = table.get("default_tier", "")
        if "default_tier" in table and (not isinstance(default, str) or default not in tiers):
            raise self._error(f"tier {short(default)} is not in this policy{_nearest(default, tiers)}", (*at, "default_tier"))
        return CallerRules(table.get("tier_from", ""), default)

    def _jwt(self) -> JwtPolicy | None:
        if "jwt" not in self._raw:
            return None
        table = self._table("jwt", 'jwks = "https://issuer.example/jwks.json"')
        at: KeyPath = ("jwt",)
        self._known(table, _JWT_FIELDS, at)
        self._required(table, ("jwks",), at)
        if importlib.util.find_spec("jwt") is None:
            raise self._error("[jwt] needs PyJWT, which is not installed: pip install 'tidegate[jwt]'", at)
        return self._placed(lambda: JwtPolicy.make(**table), table, at)

    def _namespaces(self) -> tuple[Namespace, ...]:
        found: dict[str, Namespace] = {}
        for at, table in self._tables(self._raw, "namespaces", (), MAX_NAMESPACES):
            self._known(table, _NAMESPACE_FIELDS, at)
            self._required(table, ("name",), at)
            self._placed(lambda name=table["name"]: require_name(name), table, (*at, "name"))  # type: ignore[misc]
            if table["name"] in found:
                raise self._error(f"namespace {table['name']!r} is defined twice: merge the two, or rename one", (*at, "name"))
            limits = self._limits(table.get("limits", []), (*at, "limits"))
            overrides = []
            for override_at, override in self._tables(table, "overrides", at):
                self._known(override, _NAMESPACE_OVERRIDE_FIELDS, override_at)
                self._required(override, _NAMESPACE_OVERRIDE_FIELDS, override_at)
                overrides.append((override["subject"], self._limits(override["limits"], (*override_at, "limits"))))
            given = {**table, "limits": limits, "overrides": overrides}
            found[table["name"]] = self._placed(lambda given=given: Namespace.make(**given), table, at)  # type: ignore[misc]
        return tuple(found.values())

    def _access(self) -> tuple[AccessEntry, ...]:
        found = []
        for at, table in self._tables(self._raw, "access", (), MAX_ENTRIES):
            self._known(table, _ACCESS_FIELDS, at)
            self._required(table, ("action",), at)
            given = {"networks" if field == "from" else field: value for field, value in table.items()}
            found.append(self._placed(lambda given=given: access_entry(**given), table, at))  # type: ignore[misc]
        self._placed(lambda: require_bounded(found), {}, ("access",))
        return tuple(found)

    def _table(self, name: str, example: str) -> dict[str, Any]:
        table = self._raw.get(name, {})
        if not isinstance(table, dict):
            raise self._error(f"{name} is a table: write [{name}] and {example} below it", (name,))
        return table

    def _limits(self, value: object, at: KeyPath) -> tuple[Limit, ...]:
        if not isinstance(value, list):
            raise self._error(f'limits must be a list such as ["100/minute"], not {str(value)[:40]!r}', at)
        if len(value) > MAX_LIST:
            raise self._error(f"limits has {len(value)} entries: a rule takes 1 to 16", at)
        return tuple(self._placed(lambda text=text: Limit.parse(text), {}, at) for text in value)  # type: ignore[misc]

    def _quotas(self, table: Mapping[str, Any], at: KeyPath) -> tuple[Quota, ...]:
        value, at = table.get("quotas", []), (*at, "quotas")
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._error(f'quotas must be a list such as ["100000/month"], not {str(value)[:40]!r}', at)
        if len(value) > MAX_LIST:
            raise self._error(f"quotas has {len(value)} entries: at most one for each period is possible", at)
        return self._placed(lambda: fit_quotas(value), {}, at)

    def _moment_us(self, value: object, at: KeyPath) -> int:
        field = at[-1]
        if isinstance(value, str) and field == "until":
            value = _moment_of_text(value)
        if isinstance(value, datetime.datetime):
            if value.tzinfo is None:
                raise self._error(f"{field} {value.isoformat()} has no offset: write {value.isoformat()}Z", at)
            try:
                return to_us(value)
            except ValueError as error:
                raise self._error(f"{field} {value.isoformat()}: {error}: leave it out for one without end", at) from None
        if isinstance(value, datetime.date):
            return to_us(datetime.datetime.combine(value, datetime.time(), datetime.UTC))
        raise self._error(
            f"{field} {str(value)[:40]!r} is not a valid timestamp; use ISO 8601 with an offset and without quotes, "
            "e.g. 2030-01-31T00:00:00Z",
            at,
        )

    def _tables(
        self, table: dict[str, Any], name: str, at: KeyPath, most: int | None = None
    ) -> Iterable[tuple[KeyPath, dict[str, Any]]]:
        value = table.get(name, [])
        header = ".".join([*(str(part) for part in at if isinstance(part, str)), name])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self._error(f"{name} is a list of tables: write [[{header}]]", (*at, name))
        if most is not None and len(value) > most:
            raise self._error(f"{len(value)} tables [[{header}]]: at most {most} are taken; remove some", (*at, name, most))
        return [((*at, name, number), each) for number, each in enumerate(value)]

    def _known(self, table: Mapping[str, Any], known: Iterable[str], at: KeyPath) -> None:
        for field in table:
            if field not in known:
                raise self._error(f"unknown field {field[:60]!r}{_nearest(field, known)}", (*at, field))

    def _required(self, table: Mapping[str, Any], fields: Iterable[str], at: KeyPath) -> None:
        for field in fields:
            if field not in table:
                raise self._error(f"{field!r} is missing here: add it", at)

    def _placed(self, make: Callable[[], _T], table: Mapping[str, Any], at: KeyPath) -> _T:
        """Make a record; its error gets the line of the field that it names."""
        try:
            return make()
        except PolicyError as error:
            word = error.reason.split(" ", 1)[0]
            field = _FIELD_OF_WORD.get(word, word)
            raise self._error(error.reason, (*at, field) if field in table else at) from None

    def _error(self, reason: str, at: KeyPath) -> PolicyError:
        return PolicyError(reason, self._file, self._lines.line(at))


class _Tables:
    """The reader as `toml_overrides` needs it."""

    def __init__(self, reader: _Reader) -> None:
        self.tables = reader._tables
        self.known = reader._known
        self.required = reader._required
        self.limits = reader._limits
        self.quotas = reader._quotas
        self.moment_us = reader._moment_us
        self.error = reader._error
        self.nearest = _nearest
        self._placed = reader._placed

    def placed(self, make: Callable[[], Any], at: KeyPath) -> Any:
        return self._placed(make, {}, at)


def _moment_of_text(text: str) -> object:
    """A date or a time in quotes; the text itself if it is neither."""
    for parse in (datetime.date.fromisoformat, datetime.datetime.fromisoformat):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _nearest(name: object, known: Iterable[str]) -> str:
    listed = list(itertools.islice(known, 200))
    # Comparing takes time with the square of the lengths: enough of each for a slip of the pen.
    close = difflib.get_close_matches(str(name)[:64], [each for each in listed if len(each) <= 64], n=1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": there are {', '.join(listed[:20])}" if listed else ""
